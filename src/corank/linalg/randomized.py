"""Random sketches: the range of a matrix from a few products with it (arXiv:0909.4061)."""

from __future__ import annotations

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.linalg.operands import gaussian, matrix, work_dtype


def sketch(A: Tensor, width: int, generator: torch.Generator | None = None) -> Tensor:
    """A Gaussian row sketch Y = Omega A, the cheapest faithful picture of the row space of A.

    Args:
        A: [m, n] float32 or float64; the product is taken in its dtype.
        width: rows of the sketch, 1 <= width <= m.
        generator: seed; None is a fixed seed, so equal calls give equal results.

    Returns:
        Y [width, n].

    Raises:
        CorankError: width out of range, A not a finite matrix.
    """
    A = matrix("A", A).to(work_dtype(A))
    if not 1 <= width <= A.shape[0]:
        raise CorankError(f"width must be between 1 and {A.shape[0]}, got {width}.")
    return gaussian(width, A.shape[0], A, generator) @ A


def range_finder(A: Tensor, width: int, power: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """An orthonormal basis Q of (nearly) the leading range of A: || A - Q Q^T A || is close to
    sigma_(width+1).

    Args:
        A: [m, n] float32 or float64.
        width: columns of Q, 1 <= width <= min(m, n); the wanted rank plus some oversampling.
        power: power iterations, re-orthonormalised each time; each sharpens a slowly decaying spectrum.
        generator: seed; None is a fixed seed.

    Returns:
        Q [m, width], orthonormal also if rank(A) < width.

    Raises:
        CorankError: width or power out of range, A not a finite matrix.

    Source: Halko, Martinsson, Tropp 2011 (arXiv:0909.4061), algorithm 4.4.
    """
    A = matrix("A", A).to(work_dtype(A))
    if not 1 <= width <= min(A.shape):
        raise CorankError(f"width must be between 1 and {min(A.shape)}, got {width}.")
    if power < 0:
        raise CorankError(f"power must be >= 0, got {power}.")
    Q = torch.linalg.qr(A @ gaussian(A.shape[1], width, A, generator)).Q
    for _ in range(power):
        Q = torch.linalg.qr(A.T @ Q).Q
        Q = torch.linalg.qr(A @ Q).Q
    return Q
