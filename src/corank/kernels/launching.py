"""Whether a Triton program can run on given tensors, without importing Triton before it is needed."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
LOG = logging.getLogger("corank.kernels")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
QUANTUM = 16
"""Sizes that are multiples of this are loaded as vectors; others go to torch on CUDA."""


def interpreted() -> bool:
    """Whether programs run in Triton's interpreter, on the CPU (set TRITON_INTERPRET=1 before they are imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def have_triton() -> bool:
    """Whether Triton is installed."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # somebody has put a stand-in in its place
        return False


def unsuitable(x: Tensor, *others: Tensor | None, sizes: Iterable[int] = ()) -> str | None:
    """Why no program can run on these tensors; None if one can.

    Args:
        x: what the operation is applied to.
        others: weights and biases; None is skipped.
        sizes: that have to be multiples of `QUANTUM` on CUDA.
    """
    tensors = [t for t in others if t is not None]
    if not have_triton():
        return "Triton is not installed (pip install 'corank[kernels]')"
    if x.device.type == "cpu" and not interpreted():
        return "the tensors are on the CPU"
    if x.device.type not in ("cuda", "cpu"):
        return f"there are no kernels for {x.device.type}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if x.dtype not in DTYPES:
        return f"there are no kernels for {str(x.dtype).removeprefix('torch.')}"
    floating = [t for t in tensors if t.is_floating_point()]
    if any(t.dtype != x.dtype for t in floating):
        return "the tensors have different dtypes"
    if any(t.device != x.device for t in tensors):
        return "the tensors are on different devices"
    if any(t.dim() > 1 and t.stride(-1) != 1 and t.numel() > 0 for t in tensors):
        return "a matrix is not stored row by row"
    if x.is_cuda and any(size % QUANTUM for size in sizes):
        return f"a size is not a multiple of {QUANTUM}"
    return None


def power(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


_too_large: dict[Any, int] = {}


def with_tiles(key: Any, tiles: list[Any], launch: Callable[[Any], Result]) -> Result | None:
    """Launch with the first tiles that fit into the device's shared memory, and remember which.

    Args:
        key: what decides whether they fit.
        tiles: from the best to the smallest.
        launch: called with one of them.

    Returns:
        what `launch` returned, None if no tiles fit.
    """
    from triton.runtime.errors import OutOfResources

    for i in range(_too_large.get(key, 0), len(tiles)):
        try:
            return launch(tiles[i])
        except OutOfResources:
            _too_large[key] = i + 1
            LOG.debug("tiles %s need more memory than a block of this GPU has; smaller ones are taken", tiles[i])
    return None


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the device; a small number in the interpreter, so that every path is run there."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8
