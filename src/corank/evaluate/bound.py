"""How fast this device can be: what a model reads and computes per token, and the rates nothing can beat.

A forward pass takes at least max(FLOPs / arithmetic rate, bytes of weights / bandwidth). Prefill is bound by
the
first, decoding at small batch by the second: it is why a model with fewer FLOPs need not decode faster, and
why one with fewer bytes should.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from corank.errors import CorankError

# Nothing on a CPU is slower to repeat than to be wrong about: each rate is the best of at least this many
# tries.
_TRIES = 5
_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Bound:
    """The two rates of a device, as measured on it.

    Attributes:
        flops_per_s: best rate of a square matrix product in ``dtype`` (2 FLOPs per multiply-add).
        bytes_per_s: best rate of a memory copy, read and written bytes both counted.
        device: e.g. ``"cpu"`` or ``"cuda:0"``.
        dtype: e.g. ``"float32"``.
        threads: torch's CPU threads during the measurement.
    """

    flops_per_s: float
    bytes_per_s: float
    device: str
    dtype: str
    threads: int

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time in which ``flops`` can be computed and ``nbytes`` be read (roofline)."""
        return max(flops / self.flops_per_s, nbytes / self.bytes_per_s)

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict."""
        return dataclasses.asdict(self)


def measure_bound(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    size: int | None = None,
    copy_bytes: int | None = None,
) -> Bound:
    """Measure the arithmetic rate and the bandwidth of a device, in well under a second on most.

    Args:
        device: where.
        dtype: floating dtype of the matrix product.
        size: order of the square matrices (None: 1024 on a CPU, else 8192).
        copy_bytes: size of the copied buffer (None: 128 MiB on a CPU, else 1 GiB); should exceed the caches.

    Raises:
        CorankError: ``dtype`` is not a floating dtype.
    """
    device = torch.device(device)
    if not dtype.is_floating_point:
        raise CorankError(f"A bound needs a floating dtype, not {dtype}; give e.g. torch.float32.")
    small = device.type == "cpu"
    size = size or (1024 if small else 8192)
    copy_bytes = copy_bytes or (1 << 27 if small else 1 << 30)
    with torch.no_grad():
        a = torch.ones(size, size, device=device, dtype=dtype)
        b = torch.ones(size, size, device=device, dtype=dtype)
        out = torch.empty_like(a)
        product = _best(lambda: torch.mm(a, b, out=out), device)
        source = torch.ones(copy_bytes // 4, device=device, dtype=torch.float32)
        target = torch.empty_like(source)
        copy = _best(lambda: target.copy_(source), device)
    return Bound(
        flops_per_s=2.0 * size**3 / product,
        bytes_per_s=2.0 * source.numel() * 4 / copy,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights and buffers that one forward pass reads.

    Everything is read once, whatever shares it, but for embedding tables, of which a token reads one row:
    they count only where they are also the output matrix. For a mixture of experts it is the upper bound (all
    experts).
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    ask = getattr(model, "get_output_embeddings", None)
    output = ask() if callable(ask) else None
    if output is not None:
        tables.discard(id(getattr(output, "weight", None)))
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in tables)


def count_flops(model: nn.Module, **inputs: Any) -> int:
    """FLOPs (2 per multiply-add) of the matrix products and attention of ``model(**inputs)``, counted as it
    runs.

    Masked halves of causal attention count in full.
    """
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with torch.no_grad(), counter:
        model(**inputs)
    return int(counter.get_total_flops())


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _best(work: Any, device: torch.device) -> float:
    """Seconds of the fastest of several runs, the first (warm-up) left out."""
    work()
    synchronize(device)
    best, spent, tries = float("inf"), 0.0, 0
    while tries < _TRIES or (spent < _SECONDS and tries < 100):
        started = time.perf_counter()
        work()
        synchronize(device)
        elapsed = time.perf_counter() - started
        best, spent, tries = min(best, elapsed), spent + elapsed, tries + 1
    return max(best, 1e-9)
