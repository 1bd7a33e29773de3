"""Which sites share a basis: those for which one curve of the group beats the curves of its members at the same cost.

At a price p per stored value a curve is worth min over its options of loss + p cost. The members of a group have to share
if the curve of the group is worth less than theirs together; the price is the one at which the budget is just met, that
is, the lower envelopes of (cost, loss) are compared where the allocation touches them. Whatever comes of it is allocated
and compared with sharing nothing, so that it never loses more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from corank.budget.curve import Curve
from corank.budget.options import options_of, worthwhile
from corank.errors import CorankError

Allocate = Callable[[Sequence[Curve]], dict[str, int | None]]
"""An allocator with its limit, floor and multiple."""

Family = Sequence[Curve]
"""Curves of groups without a common site: one way to group sites."""

STEPS = 60
"""Bisections of the price: its logarithm is known to 1e-16 of its range."""


def choose_groups(
    private: Sequence[Curve], families: Sequence[Family], limit: int, allocate: Allocate, multiple_of: int = 1
) -> tuple[list[Curve], dict[str, int | None]]:
    """Sites and groups, and their ranks.

    Args:
        private: one curve per site, losses known.
        families: alternative ways to group the sites; where groups of several families have sites in common, those of one
            family are used.
        limit: stored values allowed over all sites.
        allocate: how the budget is distributed over curves.
        multiple_of: ranks are multiples of this.

    Returns:
        The curves of the chosen groups and of the sites left alone, in the order of their first sites, and an allocator's
        answer for them. Its loss is at most that of sharing nothing.

    Raises:
        CorankError: as the allocator raises where nothing is shared.
    """
    market = _Market(private, families, multiple_of)
    plain = allocate(private)
    candidates = [market.at_equal_cost(plain), *market.at_the_limit(limit)]
    best = (list(private), plain)
    least = _loss(*best)
    seen: set[frozenset[str]] = {frozenset()}
    for groups in candidates:
        key = frozenset(name for group in groups for name in (f"{group.site}+{len(group.members)}", *group.members))
        if key in seen:
            continue
        seen.add(key)
        curves = with_groups(private, groups)
        try:
            ranks = allocate(curves)
        except CorankError:  # a floor may be out of reach for a group
            continue
        if (loss := _loss(curves, ranks)) < least:
            best, least = (curves, ranks), loss
    return best


def with_groups(private: Sequence[Curve], groups: Sequence[Curve]) -> list[Curve]:
    """The curves of groups in place of those of their members."""
    of = {name: group for group in groups for name in group.members}
    every = dict.fromkeys(of.get(curve.site, curve) for curve in private)
    return list(every)


def _loss(curves: Sequence[Curve], ranks: dict[str, int | None]) -> float:
    return math.fsum(curve.loss_at(ranks[curve.site]) for curve in curves)


class _Market:
    """The worth of every curve at a price, and the groups that pay there."""

    def __init__(self, private: Sequence[Curve], families: Sequence[Family], multiple_of: int) -> None:
        self.private = {curve.site: curve for curve in private}
        self.families = families
        every = [*private, *(group for family in families for group in family)]
        options = worthwhile([options_of(curve, multiple_of) for curve in every])
        self.options = {id(c): (o.cost.astype(np.float64), o.loss) for c, o in zip(every, options, strict=True)}
        self.parts = self._parts()

    def _parts(self) -> list[list[list[Curve]]]:
        """Groups that are tied together by common sites, by family: only one family can be used in each part."""
        part_of = {name: name for name in self.private}

        def find(name: str) -> str:
            while part_of[name] != name:
                name = part_of[name]
            return name

        for family in self.families:
            for group in family:
                first, *others = group.members
                for other in others:
                    part_of[find(other)] = find(first)
        parts: dict[str, list[list[Curve]]] = {}
        for i, family in enumerate(self.families):
            for group in family:
                parts.setdefault(find(group.site), [[] for _ in self.families])[i].append(group)
        return list(parts.values())

    def _best(self, curve: Curve, price: float) -> tuple[float, float]:
        """(loss + price cost, cost) of the best option."""
        cost, loss = self.options[id(curve)]
        worth = loss + price * cost
        at = int(worth.argmin())
        return float(worth[at]), float(cost[at])

    def _pick(self, gain: Callable[[Curve], float]) -> list[Curve]:
        """In every part the groups that gain, of the family in which they gain most together."""
        picked = []
        for part in self.parts:
            gains = [[(gain(group), group) for group in groups] for groups in part]
            best = max(gains, key=lambda family: math.fsum(max(g, 0.0) for g, _ in family))
            picked += [group for g, group in best if g > 0]
        return picked

    def at_equal_cost(self, ranks: dict[str, int | None]) -> list[Curve]:
        """Groups that lose less than their members do in an allocation, with what these cost there."""

        def gain(group: Curve) -> float:
            members = [self.private[name] for name in group.members]
            spent = sum(member.cost_at(ranks[member.site]) for member in members)
            lost = math.fsum(member.loss_at(ranks[member.site]) for member in members)
            cost, loss = self.options[id(group)]
            at = int(np.searchsorted(cost, spent, side="right")) - 1
            return lost - float(loss[at]) if at >= 0 else -math.inf

        return self._pick(gain)

    def at_price(self, price: float) -> tuple[list[Curve], float]:
        """Groups that pay at a price, and what everything costs there."""
        alone = {name: self._best(curve, price) for name, curve in self.private.items()}
        together = {id(g): self._best(g, price) for family in self.families for g in family}

        def gain(group: Curve) -> float:
            return math.fsum(alone[name][0] for name in group.members) - together[id(group)][0]

        groups = self._pick(gain)
        inside = {name for group in groups for name in group.members}
        cost = sum(together[id(g)][1] for g in groups) + sum(c for n, (_, c) in alone.items() if n not in inside)
        return groups, cost

    def at_the_limit(self, limit: int) -> list[list[Curve]]:
        """The groups just below and just above the price at which the budget is met."""
        spans = [(np.ptp(loss) / max(np.ptp(cost), 1.0), cost[-1]) for cost, loss in self.options.values()]
        largest = max((float(slope) for slope, _ in spans), default=0.0)
        if largest <= 0:
            return []
        low, high = math.log(largest) - 60, math.log(largest) + 60
        for _ in range(STEPS):
            middle = (low + high) / 2
            if self.at_price(math.exp(middle))[1] <= limit:
                high = middle
            else:
                low = middle
        return [self.at_price(math.exp(at))[0] for at in (high, low)]
