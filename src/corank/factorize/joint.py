"""One basis for several matrices, W'_i = B_i A, at every rank from one eigendecomposition.

    minimise  sum_i w_i || L_i (W_i - B_i A) S_i ||_F^2   over A [k, n] and B_i [m_i, k],   G_i = S_i S_i^T, R_i = L_i^T L_i

If all inputs have the same second moment G, as those of siblings have, this is the truncation of the stacked
sqrt(w_i) L_i W_i under G. If they differ (matrices of several layers), A is that of the sum of the G_i (Basis Sharing,
arXiv:2410.03765) and each B_i is fitted to A under the matrix's own G_i, which is never worse for it. The loss of every
matrix at every rank is known in either case: A S_i orthonormalised row by row is a nested basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.factorize.geometry import Geometry, Metric
from corank.factorize.spectral import Spectral
from corank.linalg import Truncation, psd_root, refit_output

DEPENDENT = 1e-10
"""A row of A S_i adds no direction if less than this part of its length is new."""


@dataclass(frozen=True, eq=False)
class Joint:
    """All common-basis factorizations of a group of g matrices.

    Attributes:
        truncation: of the stack of the matrices [sum m_i, n]: A = project[:k] stack, and the rows of up[:, :k] are the B_i
            under the pooled metric.
        losses: float64 [g, p + 1], ``|| L_i (W_i - B_i A) S_i ||_F^2`` of every matrix at the ranks 0 .. p = min(sum m_i, n).
    """

    truncation: Truncation
    losses: Tensor

    def cut(self, weights: Sequence[Tensor], geometries: Sequence[Geometry], rank: int) -> tuple[Tensor, list[Tensor]]:
        """The factors of one rank.

        Args:
            weights, geometries: those that were decomposed.
            rank: k.

        Returns:
            A [k, n] and the B_i [m_i, k]. With singular output metrics k is at most the number of directions they see.
        """
        up, A = self.truncation.pair(torch.cat(list(weights)), rank)
        parts = list(up.split([len(W) for W in weights]))
        if not _common(geometries):
            parts = [_fitted(W, g.right, B, A) for W, g, B in zip(weights, geometries, parts, strict=True)]
        return A, parts


def decompose_jointly(
    weights: Sequence[Tensor],
    geometries: Sequence[Geometry],
    shares: Sequence[float] | None = None,
    spectral: Spectral | None = None,
) -> Joint:
    """The common bases of a group at every rank.

    Args:
        weights: W_i [m_i, n].
        geometries: of each, as the matrix alone would have it.
        shares: w_i > 0, what the loss of each counts. The pooled metric then is the sum of the G_i brought to a mean
            diagonal of 1. None: all count the same, and the sum is that of the G_i as they are.
        spectral: how to decompose.

    Raises:
        CorankError: the matrices read inputs of different sizes.
    """
    if len({W.shape[1] for W in weights}) != 1:
        raise CorankError("Matrices that share a basis must read inputs of the same size.")
    common = _common(geometries)
    scale = [1.0] * len(weights)
    pooled = geometries[0].right
    if not common:
        scale = scale if shares is None else [_mean(g.right) for g in geometries]
        pooled = _pooled([g.right for g in geometries], scale)
    factors = [(1.0 if shares is None else shares[i]) * s for i, s in enumerate(scale)]
    sides = [_Side(W, g.R, f) for W, g, f in zip(weights, geometries, factors, strict=True)]
    X = torch.cat([side.X for side in sides])
    found = (spectral or Spectral()).decompose(X, Geometry(pooled))
    size = min(sum(len(W) for W in weights), X.shape[1])
    truncation = _lift(found, sides, pooled, size)
    energy = found.energy[: found.up.shape[1]]
    losses = []
    for side, g, U in zip(sides, geometries, found.up.double().split([len(s.X) for s in sides]), strict=True):
        own = U.square().sum(0) * energy if common else _captured(side.X, g.right, found.project @ X)
        loss = _tails(own, size) / (side.factor or 1.0)
        losses.append(loss)
    return Joint(truncation, torch.stack(losses))


class _Side:
    """X = sqrt(factor) L W of one matrix, and the way back."""

    def __init__(self, W: Tensor, R: Tensor | None, factor: float) -> None:
        self.W, self.factor, self.root = W, factor, factor**0.5
        self.S = None if R is None else psd_root(R.double())
        if self.S is None:
            self.X = W if factor == 1.0 else W * self.root
        else:
            weighed = W.double() * self.S[:, None] if self.S.ndim == 1 else self.S.T @ W.double()
            self.X = (weighed * self.root).to(W.dtype)

    @property
    def invertible(self) -> bool:
        if self.S is None:
            return True
        return bool((self.S > 0).all()) if self.S.ndim == 1 else self.S.shape[0] == self.S.shape[1]

    def lift(self, U: Tensor) -> Tensor:
        """L^-1 U / sqrt(factor), for an invertible L = S^T."""
        if self.S is None:
            return U / self.root
        if self.S.ndim == 1:
            return U / self.S[:, None] / self.root
        return self.S @ (U / self.S.square().sum(0)[:, None]) / self.root  # the columns of S are orthogonal

    def project(self, U: Tensor) -> Tensor:
        """U^T sqrt(factor) L."""
        if self.S is None:
            return U.T * self.root
        return (U.T * self.S if self.S.ndim == 1 else U.T @ self.S.T) * self.root


def _lift(found: Truncation, sides: list[_Side], pooled: Metric, size: int) -> Truncation:
    """The truncation of the stacked W out of that of the stacked X."""
    if all(side.S is None and side.factor == 1.0 for side in sides):
        return found
    dtype = found.up.dtype
    U = found.up.double()
    if not all(side.invertible for side in sides):
        U = U[:, : int((found.energy[: U.shape[1]] > 1e-12 * found.energy[:1]).sum())]
    blocks = U.split([len(side.X) for side in sides])
    project = torch.cat([side.project(block) for side, block in zip(sides, blocks, strict=True)], 1)
    if all(side.invertible for side in sides):
        up = torch.cat([side.lift(block) for side, block in zip(sides, blocks, strict=True)])
    else:  # what no metric sees is fitted by least squares on the features
        stack = torch.cat([side.W.double() for side in sides])
        A = project @ stack
        up = refit_output(pooled.apply(stack), A, _matrix(pooled, A))
    energy = torch.cat([found.energy, found.energy.new_zeros(size - len(found.energy))])
    return Truncation(up.to(dtype), project.to(dtype), energy, found.total)


def _captured(X: Tensor, metric: Metric, A: Tensor) -> Tensor:
    """Energy of X S [m, n] that each row of A [p, n] adds to what the rows before it hold: float64 [p]."""
    rows = metric.weigh(A.double()).T
    held = rows.new_zeros(rows.shape[1])
    kept = torch.arange(rows.shape[1])[rows.norm(dim=0) > 0]
    while True:  # a row that depends on those before it would come with a made-up direction
        Q, T = torch.linalg.qr(rows[:, kept])
        new = T.diagonal().abs() > DEPENDENT * rows[:, kept[: len(T)]].norm(dim=0)
        if len(T) == len(kept) and bool(new.all()):
            break
        if len(T) < len(kept) and bool(new.all()):
            kept = kept[: len(T)]
            continue
        kept = torch.cat([kept[: len(T)][new], kept[len(T) :]])
    held[kept] = (metric.weigh(X.double()) @ Q).square().sum(0)
    return held


def _tails(own: Tensor, size: int) -> Tensor:
    """What is lost at the ranks 0 .. size, summed from the small end."""
    own = torch.cat([own.double(), own.new_zeros(size + 1 - len(own), dtype=torch.float64)])
    return own.flip(0).cumsum(0).flip(0)


def _fitted(W: Tensor, metric: Metric, B: Tensor, A: Tensor) -> Tensor:
    """The best B for A under the matrix's own metric; what its inputs do not show stays as it is."""
    error = W.double() - B.double() @ A.double()
    return B + refit_output(metric.apply(error), A.double(), _matrix(metric, A)).to(B.dtype)


def _matrix(metric: Metric, like: Tensor) -> Tensor:
    return like.new_ones(like.shape[1], dtype=torch.float64) if metric.G is None else metric.G.double()


def _mean(metric: Metric) -> float:
    mean = 1.0 if metric.diagonal is None else float(metric.diagonal.double().mean())
    return mean if mean > 0 else 1.0


def _pooled(metrics: Sequence[Metric], scale: Sequence[float]) -> Metric:
    """sum_i G_i / scale_i; diagonal if all are."""
    n = next(len(m.G) for m in metrics if m.G is not None)
    parts = [torch.ones(n, dtype=torch.float64) if m.G is None else m.G.double() for m in metrics]
    if any(part.ndim == 2 for part in parts):
        parts = [torch.diag(part) if part.ndim == 1 else part for part in parts]
    return Metric(torch.stack([part / s for part, s in zip(parts, scale, strict=True)]).sum(0))


def _common(geometries: Sequence[Geometry]) -> bool:
    """Whether all inputs have the same metric."""
    first = geometries[0].right

    def same(other: Metric) -> bool:
        if other is first or other.G is first.G:
            return True
        if other.G is None or first.G is None or other.G.shape != first.G.shape:
            return False
        return torch.equal(other.G, first.G)

    return all(same(g.right) for g in geometries)
