"""Other ways to store a few sites together, in place of each on its own: which of them pay.

An alternative replaces the curves of some sites by others (of the same matrices after they have been narrowed, or of their
common width) and costs a loss of its own whatever the ranks. At a price p per stored value a curve is worth min over its
options of loss + p cost, an alternative the sum over its curves plus its own loss. The price is the one at which the budget
is just met; there every set of sites takes what is worth least. Whatever comes of it is allocated and compared with
leaving all sites alone, so that it never loses more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from corank.budget.curve import Curve
from corank.budget.options import options_of, worthwhile
from corank.errors import CorankError

Allocate = Callable[[Sequence[Curve]], dict[str, int | None]]
"""An allocator with its limit, floor and multiple."""

TIE = 1e-12
"""Relative difference below which two alternatives are worth the same."""

STEPS = 60
"""Bisections of the price: its logarithm is known to 1e-16 of its range."""


@dataclass(frozen=True)
class Alternative:
    """One way to store some sites together.

    Attributes:
        sites: names of the sites that it replaces.
        curves: what is to be allocated in their place.
        loss: what it loses at any ranks of these curves.
        width: what it narrows them to, as whoever made it understands it; 0 if one of the curves says it.
    """

    sites: tuple[str, ...]
    curves: tuple[Curve, ...]
    loss: float = 0.0
    width: int = 0


@dataclass(frozen=True)
class Chosen:
    """What came of it.

    Attributes:
        taken: the alternatives that are used.
        curves: of these and of the sites left alone.
        ranks: an allocator's answer for them.
        loss: of everything.
    """

    taken: tuple[Alternative, ...]
    curves: tuple[Curve, ...]
    ranks: dict[str, int | None]
    loss: float


def choose_alternatives(
    private: Sequence[Curve],
    sets: Sequence[Sequence[Alternative]],
    limit: int,
    allocate: Allocate,
    multiple_of: int = 1,
) -> Chosen:
    """Choose what to use, and the ranks.

    Args:
        private: one curve per site, losses known.
        sets: alternatives that replace the same sites; those of two sets have no site in common.
        limit: stored values allowed over all sites.
        allocate: how the budget is distributed over curves.
        multiple_of: ranks are multiples of this.

    Returns:
        A choice whose loss is at most that of using no alternative, if that is possible within the limit.

    Raises:
        CorankError: as the allocator raises for every choice.
    """
    market = _Market(private, sets, multiple_of)
    best: Chosen | None = None
    refusal: CorankError | None = None
    seen: set[tuple[int, ...]] = set()
    for picks in (tuple(-1 for _ in sets), *market.at_the_limit(limit)):
        if picks in seen:
            continue
        seen.add(picks)
        taken = tuple(alternatives[i] for i, alternatives in zip(picks, sets, strict=True) if i >= 0)
        curves = in_place(private, taken)
        try:
            ranks = allocate(curves)
        except CorankError as error:
            refusal = error
            continue
        loss = math.fsum([*(c.loss_at(ranks[c.site]) for c in curves), *(a.loss for a in taken)])
        if best is None or loss < best.loss:
            best = Chosen(taken, tuple(curves), ranks, loss)
    if best is None:
        assert refusal is not None
        raise refusal
    return best


def in_place(private: Sequence[Curve], taken: Sequence[Alternative]) -> list[Curve]:
    """The curves of alternatives in place of those of their sites."""
    of = {name: alternative for alternative in taken for name in alternative.sites}
    curves: list[Curve] = []
    used: set[int] = set()
    for curve in private:
        alternative = of.get(curve.site)
        if alternative is None:
            curves.append(curve)
        elif id(alternative) not in used:
            used.add(id(alternative))
            curves += alternative.curves
    return curves


class _Market:
    """The worth of every curve at a price."""

    def __init__(self, private: Sequence[Curve], sets: Sequence[Sequence[Alternative]], multiple_of: int) -> None:
        own = {curve.site: curve for curve in private}
        inside = {name for alternatives in sets for name in alternatives[0].sites}
        self.multiple_of = multiple_of
        self.alone = [self._options(curve) for curve in private if curve.site not in inside]
        self.sets = [
            [
                (0.0, [self._options(own[name]) for name in alternatives[0].sites]),
                *((a.loss, [self._options(curve) for curve in a.curves]) for a in alternatives),
            ]
            for alternatives in sets
        ]

    def _options(self, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
        (options,) = worthwhile([options_of(curve, self.multiple_of)])
        return options.cost.astype(np.float64), options.loss

    @staticmethod
    def _best(options: tuple[np.ndarray, np.ndarray], price: float) -> tuple[float, float]:
        """(loss + price cost, cost) of the best option."""
        cost, loss = options
        worth = loss + price * cost
        at = int(worth.argmin())
        return float(worth[at]), float(cost[at])

    def at_price(self, price: float, last: bool = False) -> tuple[tuple[int, ...], float]:
        """For every set the number of the alternative that is worth least, -1 for none, and what everything costs.

        Args:
            price: of a stored value.
            last: of several that are worth the same (that leave all dense, say), the last in place of the first.
        """
        total = sum(self._best(options, price)[1] for options in self.alone)
        picks = []
        for alternatives in self.sets:
            found = []
            for loss, curves in alternatives:
                parts = [self._best(options, price) for options in curves]
                found.append((loss + math.fsum(worth for worth, _ in parts), sum(cost for _, cost in parts)))
            least = min(worth for worth, _ in found)
            equal = [i for i, (worth, _) in enumerate(found) if worth <= least + TIE * abs(least)]
            at = equal[-1] if last else equal[0]
            picks.append(at - 1)
            total += found[at][1]
        return tuple(picks), total

    def at_the_limit(self, limit: int) -> list[tuple[int, ...]]:
        """The choices just below and just above the price at which the budget is met."""
        every = [*self.alone, *(options for a in self.sets for _, curves in a for options in curves)]
        largest = max((float(np.ptp(loss) / max(np.ptp(cost), 1.0)) for cost, loss in every), default=0.0)
        if largest <= 0:
            return []
        low, high = math.log(largest) - 60, math.log(largest) + 60
        for _ in range(STEPS):
            middle = (low + high) / 2
            if self.at_price(math.exp(middle))[1] <= limit:
                high = middle
            else:
                low = middle
        return [self.at_price(math.exp(at), last)[0] for last in (False, True) for at in (high, low)]
