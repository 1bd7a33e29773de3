"""Deep linear networks, M = W_L ... W_1: a small orthogonal start and gradient descent on all factors at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]
"""M [m, n] -> gradient of the loss at M, [m, n], in a scaling whose expected Hessian is the identity."""


def start(surrogate: Tensor, width: int, depth: int, scale: float) -> list[Tensor]:
    """The factors W_1 .. W_L to start from.

    Args:
        surrogate: M0 [m, n], whose leading singular vectors span the subspace.
        width: r^, at most min(m, n).
        depth: L, at least 2.
        scale: eps.
    """
    U, _, Vh = torch.linalg.svd(surrogate.double(), full_matrices=False)
    middle = [scale * torch.eye(width, dtype=torch.float64) for _ in range(depth - 2)]
    return [scale * Vh[:width], *middle, scale * U[:, :width]]


def product(factors: list[Tensor]) -> Tensor:
    """W_L ... W_1."""
    out = factors[0]
    for factor in factors[1:]:
        out = factor @ out
    return out


def descend(factors: list[Tensor], gradient: Gradient, rates: list[float]) -> list[Tensor]:
    """One step of gradient descent on all factors at once, each at its rate."""
    below = [torch.eye(factors[0].shape[1], dtype=factors[0].dtype)]  # W_{l-1} ... W_1
    for factor in factors[:-1]:
        below.append(factor @ below[-1])
    back = gradient(factors[-1] @ below[-1])  # (W_L ... W_{l+1})^T G
    out = []
    for factor, right, rate in zip(reversed(factors), reversed(below), reversed(rates), strict=True):
        out.append(factor - rate * back @ right.T)
        back = factor.T @ back
    return out[::-1]
