"""The two rates that nothing on a device can beat: of arithmetic, and of memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

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
        product = best(lambda: torch.mm(a, b, out=out), device)
        source = torch.ones(copy_bytes // 4, device=device, dtype=torch.float32)
        target = torch.empty_like(source)
        copy = best(lambda: target.copy_(source), device)
    return Bound(
        flops_per_s=2.0 * size**3 / product,
        bytes_per_s=2.0 * source.numel() * 4 / copy,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, the first (warm-up) left out."""
    work()
    synchronize(device)
    least, spent, tries = float("inf"), 0.0, 0
    while tries < _TRIES or (spent < _SECONDS and tries < 100):
        started = time.perf_counter()
        work()
        synchronize(device)
        elapsed = time.perf_counter() - started
        least, spent, tries = min(least, elapsed), spent + elapsed, tries + 1
    return max(least, 1e-9)
