"""Two ways to say softly how many components of every matrix are kept.

A mask is a weight in [0, 1] for every component of a truncation, never rising, and a share `dense` of the whole matrix:

    W' = sum_i (mask_i - dense) up_i project_i W + dense W

Its parameters are few and a common shift t moves all masks towards more (t > 0) or less, by which the budget is met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from corank.budget import Curve

BUCKET = 8
"""Ranks that one logit of `Buckets` stands for; fewer where a matrix has fewer than 64 useful ranks."""
WIDTH = 0.25
"""Standard deviation of the sizes that a mask of `Buckets` begins with, in parts of the dense matrix."""
SHARPNESS = (10.0, 100.0)
"""Steepness of the masks of `Positions` at the first and at the last step, per full rank."""
EPS = 1e-3
"""Weight of the curve's own loss, which decides where a mask has no opinion."""


class Masks(Protocol):
    """Masks of all sites, in the order of the curves.

    Attributes:
        theta: float64, the parameters; what is trained.
        rate: learning rate that suits them.
    """

    theta: Tensor
    rate: float

    def sizes(self, t: Tensor) -> Tensor:
        """Expected stored values of every site: [S], rising with the common shift `t`."""
        ...

    def weights(self, t: Tensor, progress: float) -> list[tuple[Tensor, Tensor]]:
        """(mask [K], dense scalar) of every site. `progress` through the training, 0 to 1."""
        ...

    def guidance(self, t: Tensor) -> Tensor:
        """A penalty of about 1 at the start, 0 once every mask is a single rank; scalar."""
        ...

    def needs(self, t: Tensor) -> list[np.ndarray]:
        """For every site, at every rank of its curve, how much more it wants: [K], positive, falling."""
        ...


class Buckets:
    """ARA's mask: a distribution over ranks, bucket by bucket; a component's weight is the chance of being kept.

    Args:
        curves: one per site; their options below break-even, in steps of `BUCKET` ranks, and dense.
        share: part of the parameters that the budget allows: where the masks begin.
    """

    rate = 0.6

    def __init__(self, curves: Sequence[Curve], share: float):
        self._curves = list(curves)
        self._ranks = [_bucket_ranks(curve) for curve in curves]
        width = max((len(r) for r in self._ranks), default=0) + 1
        self._cost = torch.full((len(self._ranks), width), math.nan, dtype=torch.float64)
        for row, curve, ranks in zip(self._cost, curves, self._ranks, strict=True):
            row[: len(ranks)] = torch.tensor([curve.cost_at(int(r)) for r in ranks], dtype=torch.float64)
            row[len(ranks)] = curve.dense_cost
        self._absent = self._cost.isnan()
        self._cost = self._cost.nan_to_num(0.0)
        self._part = self._cost / torch.tensor([[float(c.dense_cost)] for c in curves], dtype=torch.float64)
        self.theta = (-0.5 * ((self._part - share) / WIDTH).square()).masked_fill(self._absent, 0.0)

    def _distribution(self, t: Tensor) -> Tensor:
        return torch.softmax((self.theta + t * self._part).masked_fill(self._absent, -math.inf), dim=1)

    def sizes(self, t: Tensor) -> Tensor:
        """Mean cost."""
        return (self._distribution(t) * self._cost).sum(1)

    def weights(self, t: Tensor, progress: float) -> list[tuple[Tensor, Tensor]]:
        """The chance that a component is kept, and that the site stays dense."""
        found = []
        for chance, ranks in zip(self._distribution(t), self._ranks, strict=True):
            kept = chance[: len(ranks) + 1].flip(0).cumsum(0).flip(0)  # at least this option
            steps = torch.as_tensor(np.diff(ranks))
            found.append((kept[1 : len(ranks)].repeat_interleave(steps), kept[len(ranks)]))
        return found

    def guidance(self, t: Tensor) -> Tensor:
        """Variance of the sizes, relative to the initial one."""
        chance = self._distribution(t)
        mean = (chance * self._part).sum(1, keepdim=True)
        return (chance * (self._part - mean).square()).sum(1).mean() / WIDTH**2

    def needs(self, t: Tensor) -> list[np.ndarray]:
        """The chance of a larger rank."""
        found = []
        for chance, ranks, curve in zip(self._distribution(t).detach(), self._ranks, self._curves, strict=True):
            larger = (chance[: len(ranks) + 1].flip(0).cumsum(0).flip(0))[1:].numpy()
            want = np.interp(curve.ranks, ranks, larger) if len(ranks) else np.ones(len(curve.ranks))
            found.append((1 - EPS) * want + EPS * _relative(curve))
        return found


class Positions:
    """Dobi-SVD's mask: one position per matrix, where 0.5 tanh(beta (position - i / p)) + 0.5 falls from 1 to 0.

    Ranks from break-even on cost as much as dense and are dense in the end.

    Args:
        curves: one per site.
        share: part of the parameters that the budget allows: where the masks begin.
    """

    rate = 0.06

    def __init__(self, curves: Sequence[Curve], share: float):
        self._curves = list(curves)
        self._full = [min(curve.shape) for curve in curves]
        width = max(self._full, default=0) + 1
        self._cost = torch.empty((len(self._full), width), dtype=torch.float64)
        start = []
        for row, curve, p in zip(self._cost, curves, self._full, strict=True):
            cost = np.minimum(np.interp(np.arange(p + 1), curve.ranks, curve.cost), curve.dense_cost)
            row[: p + 1] = torch.from_numpy(cost)
            row[p + 1 :] = curve.dense_cost
            start.append(np.searchsorted(cost, share * curve.dense_cost) / p)
        self._p = torch.tensor(self._full, dtype=torch.float64)
        self.theta = torch.tensor(start, dtype=torch.float64)

    def _rank(self, t: Tensor) -> Tensor:
        return ((self.theta + t) * self._p).clamp(torch.zeros_like(self._p), self._p)

    def sizes(self, t: Tensor) -> Tensor:
        """Cost at the positions, between whole ranks in proportion."""
        rank = self._rank(t)
        low = rank.detach().floor().clamp_max(self._cost.shape[1] - 2).long()
        left, right = (self._cost.gather(1, (low + step)[:, None])[:, 0] for step in (0, 1))
        return left + (right - left) * (rank - low)

    def weights(self, t: Tensor, progress: float) -> list[tuple[Tensor, Tensor]]:
        """The step of every component, steeper and steeper; no part is dense."""
        beta = SHARPNESS[0] * (SHARPNESS[1] / SHARPNESS[0]) ** progress
        none = torch.zeros((), dtype=torch.float64)
        found = []
        for position, p in zip(self.theta + t, self._full, strict=True):
            at = (torch.arange(p, dtype=torch.float64) + 0.5) / p
            found.append((0.5 * torch.tanh(beta * (position - at)) + 0.5, none))
        return found

    def guidance(self, t: Tensor) -> Tensor:
        """None: the steps become steep by themselves."""
        return torch.zeros((), dtype=torch.float64)

    def needs(self, t: Tensor) -> list[np.ndarray]:
        """How far the position lies above a rank, plus a constant that makes it positive."""
        at = (self.theta + t).detach().clamp(0.0, 1.0).tolist()
        return [
            (1 - EPS) * (2.0 + x - c.ranks / p) + EPS * _relative(c)
            for x, c, p in zip(at, self._curves, self._full, strict=True)
        ]


def _bucket_ranks(curve: Curve) -> np.ndarray:
    """Ranks of a curve below break-even at the edges of the buckets: the least, the largest, and between."""
    useful = curve.ranks[curve.cost < curve.dense_cost]
    if len(useful) < 2:
        return useful
    step = min(BUCKET, max(1, int(useful[-1]) // 8))
    edges = np.searchsorted(useful, np.arange(int(useful[0]), int(useful[-1]), step))
    return useful[np.unique(np.append(edges, len(useful) - 1))]


def _relative(curve: Curve) -> np.ndarray:
    return curve.loss / max(float(curve.loss.max(initial=0.0)), np.finfo(np.float64).tiny)


def hard(mask: Tensor) -> Tensor:
    """The nearest mask of zeros and ones."""
    return (mask >= 0.5).to(mask.dtype)
