"""The part of a matrix that an adapter takes over: its leading or its last components under a metric."""

from __future__ import annotations

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.linalg.operands import matrix
from corank.linalg.truncation import truncate


def components(W: Tensor, rank: int, G: Tensor | None = None, minor: bool = False) -> tuple[Tensor, Tensor]:
    """Balanced factors B [m, r], A [r, n] of a part of W, by the energy of its outputs on inputs of second moment G.

    With U the eigenvectors of W G W^T, by descending energy, and U_r the first r of them, B A = U_r U_r^T W: the best
    approximation of rank r of W in || . G^{1/2} ||_F. `minor` takes the last r instead, which the outputs need least.
    Both are exact parts: what is left, (I - U_r U_r^T) W, has the other components. With G = None these are the
    singular components, B = U sqrt(S) and A = sqrt(S) V^T (PiSSA, arXiv:2404.02948; minor: MiLoRA,
    arXiv:2406.09044). No inverse of G is taken.

    Args:
        W: [m, n].
        rank: r, at most min(m, n).
        G: [n, n] positive semidefinite, [n] a diagonal, or None for the identity.
        minor: the last components instead of the first.

    Returns:
        (B, A), float64, with columns and rows of equal norms. Components that are zero stay zero.

    Raises:
        CorankError: a rank that is too large, not finite, shapes that do not fit.
    """
    matrix("W", W)
    if not 0 <= rank <= min(W.shape):
        raise CorankError(f"rank must be between 0 and {min(W.shape)} for a {list(W.shape)} matrix, got {rank}.")
    found = truncate(W.double(), None if G is None else G.double(), rank=None if minor else rank)
    last = slice(found.up.shape[1] - rank, None)
    B = found.up[:, last] if minor else found.up[:, :rank]
    A = B.T @ W.double()
    norms = A.norm(dim=1)
    root = torch.where(norms > 0, norms, torch.ones_like(norms)).sqrt()
    return B * root, A / root[:, None]
