"""Which way of computing a layer is the fastest on this machine: measured, and remembered.

The table is kept per device. What was measured with another version of a library, another number of threads or on
another device of the same name says nothing about this one and is ignored.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corank.account import VERSION
from corank.errors import CorankError
from corank.factors import shape_of
from corank.jsonfile import read_json, write_json
from corank.runtime.override import note

GAIN = 0.97
"""A way is taken instead of the plain one if it takes less than this share of its time: timing is not exact."""
SECONDS, ROUNDS = 0.25, (3, 30)


def device_name(device: torch.device) -> str:
    """Name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def stamp(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on besides the layer."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    versions = {"torch": torch.__version__, "triton": triton, "corank": VERSION}
    return {"device": device_name(device), "threads": threads, **versions}


def bucket(tokens: int) -> int:
    """The power of two at or above a number of tokens."""
    return 1 << max(0, tokens - 1).bit_length()


def size_of(x: Tensor) -> tuple[int, torch.dtype, torch.device]:
    """What a choice for one layer depends on, for x [tokens, in]."""
    return bucket(x.shape[0]), x.dtype, x.device


def capturing(x: Tensor) -> bool:
    """Whether what is done with x now is recorded for a CUDA graph; nothing can be measured then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Table:
    """Measured choices.

    Args:
        folder: where they are kept; None takes corank's cache (`CORANK_CACHE`, else ~/.cache/corank).
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        if folder is None:
            folder = os.environ.get("CORANK_CACHE") or Path.home() / ".cache" / "corank"
        self.folder = Path(folder)
        self._known: dict[str, dict[str, Any]] = {}

    def path(self, device: torch.device) -> Path:
        """The file of a device."""
        return self.folder / f"dispatch-{re.sub(r'[^A-Za-z0-9]+', '-', device_name(device)).strip('-').lower()}.json"

    def entries(self, device: torch.device) -> dict[str, Any]:
        """What is known of a device: key -> {"choice", "seconds"}."""
        name = str(device)
        if name not in self._known:
            self._known[name] = {}
            path = self.path(device)
            if path.is_file():
                try:
                    document = read_json(path)
                except CorankError:
                    document = {}
                if document.get("stamp") == stamp(device) and isinstance(document.get("entries"), dict):
                    self._known[name] = document["entries"]
                else:
                    note(f"{path.name} was measured with other hardware or versions; it is measured again")
        return self._known[name]

    def choose(
        self,
        what: str,
        layers: Sequence[Any],
        x: Tensor,
        ways: Mapping[str, Callable[[], Any]],
        lean: str | None = None,
    ) -> str:
        """The name of the way to take.

        Args:
            what: the kind of computation.
            layers: the matrices in it; their kinds, shapes and ranks are part of the key.
            x: [tokens, in], what they are applied to.
            ways: name -> the computation; `torch` is the plain one.
            lean: a way that needs less memory, taken also where it is only as fast as the plain one.
        """
        if len(ways) == 1:
            return next(iter(ways))
        sizes = [f"{getattr(w, 'kind', 'dense')}{list(shape_of(w))}r{getattr(w, 'rank', '')}" for w in layers]
        dtype = str(x.dtype).removeprefix("torch.")
        key = " ".join([what, *sizes, dtype, f"t{bucket(x.shape[0])}", "+".join(sorted(ways))])
        entries = self.entries(x.device)
        if key not in entries:
            if capturing(x):
                return "torch"
            seconds = measure(ways, x.device)
            entries[key] = {"choice": choice(seconds, lean), "seconds": seconds}
            self._write(x.device)
        return entries[key]["choice"] if entries[key]["choice"] in ways else "torch"

    def _write(self, device: torch.device) -> None:
        try:
            write_json(self.path(device), {"stamp": stamp(device), "entries": self.entries(device)})
        except OSError as error:
            note(f"the measured choices could not be kept ({error.strerror}); they are measured again next time")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_known": {}}


def choice(seconds: Mapping[str, float], lean: str | None = None) -> str:
    """The fastest way, the plain one unless another is clearly faster; `lean` is preferred among equals."""
    plain = seconds["torch"]
    best = min(seconds, key=lambda way: seconds[way])
    if lean is not None and lean in seconds and seconds[lean] <= min(plain, seconds[best] / GAIN):
        return lean
    return best if seconds[best] < GAIN * plain else "torch"


def measure(ways: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Seconds of each way, the least of several rounds in which they take turns; infinite if it lacks memory."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    least = dict.fromkeys(ways, float("inf"))
    possible = {}
    for name, way in ways.items():
        try:
            way()
            possible[name] = way
        except torch.OutOfMemoryError:
            note(f"there is not enough memory for the way {name!r}; another one is taken")
    wait()
    began = time.perf_counter()
    for turn in range(ROUNDS[1]):
        for name, way in possible.items():
            start = time.perf_counter()
            way()
            wait()
            least[name] = min(least[name], time.perf_counter() - start)
        if turn + 1 >= ROUNDS[0] and time.perf_counter() - began > SECONDS:
            break
    return least
