"""What a site would lose and cost at every rank."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from corank.errors import CorankError

#: Stored values of an m x n matrix at a rank: ``count(m, n, rank)``, as every factor kind gives it.
CountFn = Callable[[int, int, int], int]


@dataclass(frozen=True, eq=False)
class Curve:
    """Loss and cost of one site (or of one group that shares a basis) at the ranks it may take.

    Besides these ranks the site may always stay dense: loss 0 at ``dense_cost``.

    Attributes:
        site: name.
        shape: (m, n).
        ranks: int64 [K], strictly ascending, from 0 to at most min(m, n).
        loss: float64 [K], predicted loss; NaN where it is not known (enough for `uniform`).
        cost: int64 [K], stored values, never falling as the rank grows; or nanoseconds (see `priced`).
        dense_cost: the same when dense.
        role: role of the matrix in its layer (q, k, v, o, gate, up, down, ...); some allocators share a budget among
            the sites of one role. "" is a role like any other.
        layer: index of its layer.
        importance: how much the layer matters, finite and not negative, in any unit common to the sites; only what
            `swift_svd` reads.
        members: of a group that shares a basis, name -> (m_i, n) of every site; the first stores the basis and gives the
            curve its name, and `shape` is (sum of the m_i, n). Empty for a site of its own.
        first_order: float64 [K], change of the model's loss at every rank to first order, of either sign; None: not
            known. Only what `zero_sum` reads.

    Raises:
        CorankError: if the arrays differ in length or are not ordered as said, or the importance is out of range.
    """

    site: str
    shape: tuple[int, int]
    ranks: np.ndarray
    loss: np.ndarray
    cost: np.ndarray
    dense_cost: int
    role: str = ""
    layer: int = 0
    importance: float = 1.0
    first_order: np.ndarray | None = None
    members: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field, dtype in (("ranks", np.int64), ("loss", np.float64), ("cost", np.int64)):
            object.__setattr__(self, field, np.asarray(getattr(self, field)).astype(dtype))
        if self.ranks.ndim != 1 or not self.ranks.shape == self.loss.shape == self.cost.shape:
            raise CorankError(
                f"The curve of {self.site!r} has {self.ranks.shape} ranks, {self.loss.shape} losses and "
                f"{self.cost.shape} costs; give one loss and one cost per rank."
            )
        if self.first_order is not None and np.shape(self.first_order) != self.ranks.shape:
            raise CorankError(f"The curve of {self.site!r} needs one first-order change per rank.")
        if self.dense_cost < 1:
            raise CorankError(f"The site {self.site!r} is empty; leave it out.")
        if len(self.ranks) and (self.ranks[0] < 0 or self.ranks[-1] > min(self.shape)):
            raise CorankError(f"The curve of {self.site!r} has ranks outside 0..{min(self.shape)}.")
        if (np.diff(self.ranks) <= 0).any() or (np.diff(self.cost) < 0).any():
            raise CorankError(f"The curve of {self.site!r} needs ascending ranks with costs that never fall.")
        if not (math.isfinite(self.importance) and self.importance >= 0):
            raise CorankError(f"The importance of {self.site!r} is {self.importance}; give a number of at least 0.")

    @classmethod
    def from_count(
        cls,
        site: str,
        shape: tuple[int, int],
        count: CountFn,
        loss: Any = None,
        ranks: Iterable[int] | None = None,
        *,
        role: str = "",
        layer: int = 0,
        importance: float = 1.0,
    ) -> Curve:
        """The curve of a factor kind.

        Args:
            site: name.
            shape: (m, n).
            count: ``count(m, n, rank)`` of the kind.
            loss: array-like [K]; None: not known.
            ranks: [K]; None: 0, 1, ... as long as ``loss``, or up to min(m, n).
            role: as in `Curve`.
            layer: as in `Curve`.
            importance: as in `Curve`.
        """
        m, n = shape
        if ranks is None:
            ranks = range(min(m, n) + 1 if loss is None else len(loss))
        at = np.fromiter(ranks, dtype=np.int64)
        cost = np.fromiter((count(m, n, rank) for rank in at.tolist()), dtype=np.int64, count=len(at))
        losses = np.full(len(at), np.nan) if loss is None else np.asarray(loss, dtype=np.float64)
        return cls(site, (m, n), at, losses, cost, m * n, role, layer, importance)

    def weighted(self, weight: float) -> Curve:
        """The same with every loss multiplied by ``weight`` (the currency of the site)."""
        return replace(self, loss=self.loss * weight)

    def priced(self, cost: Any, dense_cost: int) -> Curve:
        """The same with costs in another currency, such as nanoseconds, in which the budget is then counted too.

        Args:
            cost: [K], at every rank; where it falls as the rank grows, the cost of the smaller rank is used.
            dense_cost: when dense.
        """
        rising = np.maximum.accumulate(np.asarray(cost, dtype=np.int64)) if len(self.ranks) else self.cost
        return replace(self, cost=rising, dense_cost=dense_cost)

    def loss_at(self, rank: int | None) -> float:
        """Loss at a rank of the curve, 0 for None (dense)."""
        return 0.0 if rank is None else float(self.loss[self._position(rank)])

    def cost_at(self, rank: int | None) -> int:
        """Cost at a rank of the curve, or dense for None."""
        return self.dense_cost if rank is None else int(self.cost[self._position(rank)])

    def _position(self, rank: int) -> int:
        position = int(np.searchsorted(self.ranks, rank))
        if position == len(self.ranks) or self.ranks[position] != rank:
            raise CorankError(f"Rank {rank} is not on the curve of {self.site!r}.")
        return position


def count_break_even(shape: tuple[int, int], count_fn: CountFn) -> int:
    """The largest rank whose factored form is smaller than the dense matrix.

    Args:
        shape: (m, n).
        count_fn: ``count(m, n, rank)``, not falling in the rank.

    Returns:
        max {rank <= min(m, n): count(m, n, rank) < m n}, or -1 if even rank 0 is not smaller.
    """
    m, n = shape
    return bisect_left(range(min(m, n) + 1), m * n, key=lambda rank: count_fn(m, n, rank)) - 1
