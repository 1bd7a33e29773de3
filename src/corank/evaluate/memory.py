"""The peak memory of a block of code, without psutil."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

from corank.errors import CorankError

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """Resident memory of this process now, in bytes; None where the system does not say (no /proc)."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def high_water_bytes() -> int:
    """The most resident memory this process ever had, in bytes; 0 where the system does not say."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakMemory:
    """Context manager that records the peak memory used while its block runs.

    Resident memory is sampled by a thread. The high-water mark of the kernel sharpens the samples: if it rose
    during the block then it is the peak, exactly, however short the spike was.

    Example::

        with PeakMemory() as memory:
            compress(...)
        print(memory.peak_bytes, memory.grown_bytes)

    Attributes:
        start_bytes: resident memory on entry.
        peak_bytes: the largest resident memory seen during the block.
        cuda_bytes: the largest memory allocated by torch on any one CUDA device during the block; None
            without CUDA. Entering the block resets torch's own peak counters.
        exact: False where resident memory cannot be sampled and ``peak_bytes`` is that of the whole process
        so far.
    """

    def __init__(self, interval: float = 0.005) -> None:
        """Args: interval: seconds between samples, > 0."""
        if not interval > 0:
            raise CorankError(f"interval={interval} is not possible; give seconds above 0, e.g. 0.005.")
        self.interval = interval
        self.start_bytes = 0
        self.peak_bytes = 0
        self.cuda_bytes: int | None = None
        self.exact = True
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._mark = 0

    @property
    def grown_bytes(self) -> int:
        """``peak_bytes - start_bytes``: what the block itself needed."""
        return max(0, self.peak_bytes - self.start_bytes)

    def to_json(self) -> dict[str, int | bool | None]:
        """{"peak_bytes", "grown_bytes", "cuda_bytes", "exact"}."""
        return {
            "peak_bytes": self.peak_bytes,
            "grown_bytes": self.grown_bytes,
            "cuda_bytes": self.cuda_bytes,
            "exact": self.exact,
        }

    def __enter__(self) -> PeakMemory:
        now = resident_bytes()
        self.exact = now is not None
        self.start_bytes = self.peak_bytes = now if now is not None else high_water_bytes()
        self._mark = high_water_bytes()
        self.cuda_bytes = None
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        self._stop = threading.Event()
        if self.exact:
            self._thread = threading.Thread(target=self._watch, name="corank-peak-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._sample()
        mark = high_water_bytes()
        if mark > self._mark or not self.exact:
            self.peak_bytes = max(self.peak_bytes, mark)
        if torch.cuda.is_available():
            devices = range(torch.cuda.device_count())
            self.cuda_bytes = max(torch.cuda.max_memory_allocated(device) for device in devices)

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, resident_bytes() or 0)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()
