"""What a matrix argument has to be, checked in one place: every error names the argument and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from corank.errors import CorankError

EPS = torch.finfo(torch.float64).eps
"""Unit roundoff of the working precision; float32 input is worked on in float64 as well."""

TINY = torch.finfo(torch.float64).tiny
"""Smallest normal number of the working precision; a floor for divisors."""


def finite(A: Tensor) -> bool:
    """Whether A holds neither NaN nor infinity; one pass, no temporary of the size of A."""
    return A.numel() == 0 or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(A))


def matrix(name: str, W: Tensor) -> Tensor:
    """Return W if it is a finite 2-D floating point tensor.

    Raises:
        CorankError: not 2-D, not floating point, or not finite.
    """
    if W.ndim != 2:
        raise CorankError(f"{name} must be a 2-D matrix, got shape {list(W.shape)}; reshape it to [out, in] first.")
    if not W.is_floating_point():
        raise CorankError(f"{name} must be floating point, got {W.dtype}; dequantize it first.")
    if not finite(W):
        raise CorankError(f"{name} contains NaN or infinity; check the weights or the calibration run it came from.")
    return W


def metric(name: str, G: Tensor, size: int) -> Tensor:
    """Return G if it is a metric on `size` channels: [size, size], or its diagonal [size].

    Raises:
        CorankError: wrong shape, not finite, or a diagonal entry that is negative beyond rounding.
    """
    if G.ndim not in (1, 2) or any(extent != size for extent in G.shape):
        raise CorankError(f"{name} must have shape [{size}, {size}] or [{size}], got {list(G.shape)}.")
    if not finite(G):
        raise CorankError(f"{name} contains NaN or infinity; check the calibration run it came from.")
    diagonal = G if G.ndim == 1 else G.diagonal()
    if size and float(diagonal.min()) < -1e-6 * float(diagonal.abs().max()):
        raise CorankError(f"{name} has a negative diagonal entry; a second moment cannot, so pass E[x x^T].")
    return G


def work_dtype(W: Tensor) -> torch.dtype:
    """The dtype results are returned in: W's own if float32 or float64, float32 for half precisions."""
    return W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator itself, or a fresh CPU generator with seed 0: no result depends on hidden state."""
    return generator if generator is not None else torch.Generator().manual_seed(0)


def gaussian(rows: int, columns: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal [rows, columns], drawn on the generator's device and moved to that of `like`."""
    source = seeded(generator)
    draw = torch.randn(rows, columns, generator=source, device=source.device, dtype=torch.float32)
    return draw.to(device=like.device, dtype=like.dtype)
