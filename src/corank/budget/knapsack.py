"""The exact answer: a multiple-choice knapsack by dynamic programming. Mainly an oracle for the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from corank.budget.curve import Curve
from corank.budget.options import Options, along_hulls, fill, prepare, ranks_of, total_cost, total_loss, worthwhile


def knapsack(
    curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1, bins: int = 8192
) -> dict[str, int | None]:
    """The least total loss within the limit.

    Exact if the room above the cheapest options is at most ``bins`` times the greatest common divisor of the costs.
    Otherwise costs are rounded up to one of ``bins`` equal parts of the room and what that wastes is filled as in
    `lagrange`; as the waste of many sites can exceed what the search gains, the answer of `lagrange` is returned where
    this one is no better. Time and memory grow with sites x ``bins``; `lagrange` is the allocator for daily use.

    Args:
        curves: one per site; losses of different sites are added, so they must be in one currency.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).
        bins: how finely the room is divided.

    Returns:
        site -> rank, or None for dense; never a larger loss than that of `lagrange`.

    Raises:
        CorankError: as in `lagrange`.
    """
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    greedy = fill(options, along_hulls(options, limit), limit)
    searched = fill(options, _search(options, limit, bins), limit)
    # Among equals the greedy answer is the one that treats equal sites alike.
    better = total_loss(options, searched) < total_loss(options, greedy) * (1 - 1e-12)
    return ranks_of(curves, options, searched if better else greedy)


def _search(options: Sequence[Options], limit: int, bins: int) -> list[int]:
    """Positions of the least loss with costs in whole units, rounded up."""
    extra = [option.cost - option.cost[0] for option in options]
    most = sum(int(steps[-1]) for steps in extra)
    room = min(limit - total_cost(options, [0] * len(options)), most)
    unit = int(np.gcd.reduce(np.concatenate([*extra, [0]]))) or 1
    if room // unit > bins:
        unit = -(-room // bins)
    width = room // unit + 1
    # least[c]: the least loss of the sites so far with at most c units; pick[i][c]: what site i is then.
    least = np.zeros(width)
    picks = []
    for option, steps in zip(options, extra, strict=True):
        units = -(-steps // unit)
        # Of the options in one bin the last loses least.
        candidates = np.flatnonzero((units < width) & np.append(np.diff(units) > 0, True))
        new, pick = np.full(width, np.inf), np.zeros(width, dtype=np.int64)
        for at in candidates.tolist():
            start = int(units[at])
            total = least[: width - start] + option.loss[at]
            better = total < new[start:]
            np.copyto(new[start:], total, where=better)
            np.copyto(pick[start:], at, where=better)
        least = new
        picks.append((pick, units))
    chosen = []
    left = width - 1
    for pick, units in reversed(picks):
        at = int(pick[left])
        chosen.append(at)
        left -= int(units[at])
    return chosen[::-1]
