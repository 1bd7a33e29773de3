"""A device as the time model sees it: how many bytes and operations in a second, and what one launch costs.

It is measured once and kept in the user's cache directory, under the device's name, the dtype, the number of threads
and the version of torch; figures of any other device or version are never used. For devices that one may want to ask
about without having one there are presets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from corank.errors import CorankError, unknown
from corank.jsonfile import read_json, write_json
from corank.model.zoo import cache_directory
from corank.timing.rates import best, measure_bound

QUANTA = (1, 8, 16, 32, 64)
"""Multiples of a rank that kernels may be faster at."""
GAIN = 1.03
"""A larger multiple is chosen only if it is faster per unit of rank by this factor: less is noise."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What the time model knows of a device.

    Attributes:
        name: of the processor or the GPU.
        dtype: the figures are for weights and activations of this dtype, e.g. "bfloat16".
        bytes_per_s: of memory, read and written bytes both counted.
        flops_per_s: of a large matrix product, 2 per multiply-add.
        kernel_s: seconds of a kernel that does nothing, its ramp and drain: what every launch adds to the time of its
            bytes and operations.
        launch_s: seconds that the host needs to queue one kernel, where kernels are queued (GPUs); no eager step is
            shorter than its launches times this. 0 where the host computes itself.
        quantum: ranks should be multiples of this.
        threads: CPU threads; None on a GPU.
        torch: version it was measured with, "" for a preset.
        assumed: the figures were not measured here.
    """

    name: str
    dtype: str
    bytes_per_s: float
    flops_per_s: float
    kernel_s: float
    launch_s: float = 0.0
    quantum: int = 1
    threads: int | None = None
    torch: str = ""
    assumed: bool = False

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CorankError(f"{self.dtype!r} is not a floating-point dtype; use float32, bfloat16 or float16.")
        if not (self.bytes_per_s > 0 and self.flops_per_s > 0 and self.kernel_s >= 0 and self.launch_s >= 0):
            raise CorankError(
                f"The device {self.name!r} needs positive rates, and costs of a launch that are not below 0."
            )
        if self.quantum < 1:
            raise CorankError(f"The device {self.name!r} has a quantum of {self.quantum}; give 1 or more.")

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return getattr(torch, self.dtype).itemsize

    def roofline(self, flops: float, nbytes: float) -> float:
        """The least seconds in which so much can be computed and moved."""
        return max(flops / self.flops_per_s, nbytes / self.bytes_per_s)

    def seconds(self, flops: float, nbytes: float, launches: float = 1) -> float:
        """launches t0 + max(bytes / bandwidth, flops / peak)."""
        return launches * self.kernel_s + self.roofline(flops, nbytes)

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict; `from_json` gives it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Device:
        """The inverse of `to_json`.

        Raises:
            CorankError: a field is missing, or is not one.
        """
        try:
            return cls(**document)
        except TypeError as error:
            raise CorankError(f"This does not describe a device ({error}); see corank.timing.Device.") from None


PRESETS: dict[str, Device] = {
    # Bandwidth and peak as a copy and an 8192^3 product gave them; what a launch costs is assumed.
    "h200": Device("NVIDIA H200", "bfloat16", 4.3e12, 790e12, kernel_s=2.5e-6, launch_s=7e-6, quantum=64, assumed=True),
}


def find_device(name: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Device:
    """A device by name.

    Args:
        name: a preset ("h200"), a JSON file that describes one, "cpu", "cuda" or "cuda:1"; None: the GPU of this machine
            if it has one, else its processor.
        dtype: of the weights; presets and files have their own.

    Raises:
        CorankError: no such preset, file or device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith(".json"):
        return Device.from_json(read_json(name))
    if name == "cpu" or name.split(":")[0] == "cuda":
        if name != "cpu" and not torch.cuda.is_available():
            raise CorankError(f"This machine has no GPU to measure; ask about a preset instead: {', '.join(PRESETS)}.")
        return this_device(name, dtype)
    raise unknown("device", name, [*PRESETS, "cpu", "cuda"])


def this_device(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Device:
    """A device of this machine, from the cache, or measured (a few seconds) and put there."""
    device = torch.device(device)
    key = {
        "name": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
    }
    file = cache_file(key)
    if file.is_file():
        try:
            found = Device.from_json(read_json(file))
            if {k: getattr(found, k) for k in key} == key:
                return found
        except CorankError:  # of another version of this package, or damaged: measured again
            pass
    found = measure_device(device, dtype)
    write_json(file, found.to_json())
    return found


def cache_file(key: Mapping[str, Any]) -> Path:
    """Where the figures of a device are kept."""
    digest = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:16]
    return cache_directory() / "devices" / f"{digest}.json"


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure_device(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, size: int | None = None
) -> Device:
    """Measure what the time model needs to know.

    Args:
        device: where.
        dtype: of weights and activations.
        size: order of the matrices that the arithmetic rate is measured with; None: as `measure_bound` has it.

    Raises:
        CorankError: ``dtype`` is not a floating dtype.
    """
    device = torch.device(device)
    copy_bytes = None if size is None else size * size * 4
    bound = measure_bound(device, dtype, size=size, copy_bytes=copy_bytes)
    queued = device.type != "cpu"
    launch = _empty_launch(device, dtype)
    return Device(
        name=device_name(device),
        dtype=bound.dtype,
        bytes_per_s=bound.bytes_per_s,
        flops_per_s=bound.flops_per_s,
        kernel_s=_empty_kernel(device, dtype) if queued else launch,
        launch_s=launch if queued else 0.0,
        quantum=measure_quantum(device, dtype, width=size or (2048 if not queued else 4096)),
        threads=None if queued else bound.threads,
        torch=torch.__version__,
    )


def measure_quantum(device: torch.device, dtype: torch.dtype, width: int) -> int:
    """The multiple that a rank should be of: the smallest one whose products are about as fast per unit as any.

    Two products, [128, n] with [r, n] and back, at ranks that are multiples of a candidate and of nothing larger.
    """
    base = max(width // 2 // 128, 1) * 128  # a multiple of every candidate
    x = torch.ones(128, width, device=device, dtype=dtype)

    def run(rank: int) -> Callable[[], object]:
        A = torch.ones(rank, width, device=device, dtype=dtype)
        B = torch.ones(width, rank, device=device, dtype=dtype)
        return lambda: F.linear(F.linear(x, A), B)

    with torch.no_grad():
        per_unit = {q: best(run(base + q), device) / (base + q) for q in QUANTA}
    least = min(per_unit.values())
    return next(q for q in QUANTA if per_unit[q] <= GAIN * least)


def _empty_launch(device: torch.device, dtype: torch.dtype, count: int = 1000) -> float:
    """Seconds per call of a chain of products so small that only the calls cost."""
    x = torch.ones(1, 16, device=device, dtype=dtype)
    W = torch.ones(16, 16, device=device, dtype=dtype)

    def chain() -> None:
        y = x
        for _ in range(count):
            y = F.linear(y, W)

    with torch.no_grad():
        return best(chain, device) / count


def _empty_kernel(device: torch.device, dtype: torch.dtype, count: int = 1000) -> float:
    """Seconds per kernel of the same chain replayed from a CUDA graph, without the host."""
    x = torch.ones(1, 16, device=device, dtype=dtype)
    W = torch.ones(16, 16, device=device, dtype=dtype)
    with torch.no_grad():
        F.linear(x, W)  # the library sets itself up outside the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x
            for _ in range(count):
                y = F.linear(y, W)
        return best(graph.replay, device) / count
