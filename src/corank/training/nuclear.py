"""The nuclear norm as a penalty: sum of the singular values, whose minimisation lowers the rank.

A subgradient at W = U diag(s) V^T of rank r is U_r V_r^T (Watson 1992): that of a matrix with zero singular values leaves
them alone. The penalty of a masked matrix M * W has the subgradient M * (U_r V_r^T) with respect to W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TINY = 1e-6
"""Singular values below this share of the largest count as zero."""


def polar(W: Tensor) -> tuple[Tensor, Tensor]:
    """The nuclear norm of a matrix, a scalar, and the subgradient U_r V_r^T [m, n]."""
    U, s, Vt = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
    kept = s > TINY * s[:1]
    return s.sum().to(W.dtype), ((U * kept) @ Vt).to(W.dtype)


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:
        value, direction = polar(W)
        ctx.save_for_backward(direction)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (direction,) = ctx.saved_tensors
        return gradient * direction


def nuclear_norm(W: Tensor) -> Tensor:
    """|| W ||_*, a scalar; its gradient is finite for any W, that of `torch.linalg.svd` is not.

    Args:
        W: [m, n].
    """
    return _NuclearNorm.apply(W)  # type: ignore[no-any-return]


def shrunk(W: Tensor, threshold: float) -> Tensor:
    """argmin_X 1/2 || X - W ||_F^2 + threshold || X ||_*: singular values become max(s - threshold, 0).

    Source: Cai, Candes, Shen 2010, arXiv:0810.3286.
    """
    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
    return (U * (s - threshold).clamp_min(0)) @ Vt
