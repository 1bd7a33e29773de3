"""The compression step of rank learning: an exact choice of every rank at one price per parameter.

Idelbayev and Carreira-Perpinan, "Low-rank Compression of Neural Nets: Learning the Rank of Each Layer", CVPR 2020. The ranks
are learned by min L(W) + lam sum_l C_l(r_l) with rank(W_l) = r_l, in turns; the step that compresses is

    for every layer   min over r = 0 ... R and dense   mu / 2 sum_{i > r} s_i^2 + lam C_l(r)

which falls apart into one enumeration for each layer. Only lam / mu matters for it, and the budget fixes that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from corank.budget.curve import Curve
from corank.budget.hull import hull_steps
from corank.budget.options import Options, climb, fill, options_of, prepare, ranks_of, total_cost, worthwhile

_HALVINGS = 100
"""Enough for the price to be exact to the last bit."""


def c_step(curves: Sequence[Curve], price: float, *, mu: float = 2.0, multiple_of: int = 1) -> dict[str, int | None]:
    """The best rank of every site at a price per stored value; of equals the one that costs least.

    Args:
        curves: one per site; the loss at a rank is the tail energy sum_{i > r} s_i^2, in whatever geometry.
        price: lam >= 0. At 0 nothing is lost; no rank rises as it rises.
        mu: weight of the quadratic penalty.
        multiple_of: ranks are multiples of this (full rank and dense excepted).

    Returns:
        site -> rank, or None for dense.
    """
    options = worthwhile([options_of(curve, multiple_of) for curve in curves])
    return ranks_of(curves, options, _enumerate(options, price, mu))


def lc_rank(curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1) -> dict[str, int | None]:
    """The compression step at the lowest price that the limit allows, which bisection finds.

    All sites pay one price, so the choice is the least loss of all choices that cost as much. What is left of the limit goes
    first to the steps that are worth exactly the last price (where the loss falls evenly), round the sites, then to the
    single upgrades that save most.

    Args:
        curves: one per site; losses of different sites are added, so they must be in one currency.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).

    Returns:
        site -> rank, or None for dense.

    Raises:
        CorankError: as in `lagrange`.
    """
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    return ranks_of(curves, options, fill(options, _within(options, limit), limit))


def _within(options: Sequence[Options], limit: int) -> list[int]:
    """Positions at the lowest price at which they cost no more than the limit, and what else fits at that price."""
    above = _enumerate(options, 0.0)
    if total_cost(options, above) <= limit:
        return above
    below = [0] * len(options)
    # at twice the steepest fall nothing is worth more than the cheapest option
    steepest = max(float((np.diff(-o.loss) / np.diff(o.cost)).max(initial=0.0)) for o in options)
    cheap, dear = 0.0, 2 * steepest
    for _ in range(_HALVINGS):
        # prices differ by many orders of magnitude: first find the right one
        price = (cheap + dear) / 2 if cheap else dear / 16
        found = _enumerate(options, price)
        if total_cost(options, found) > limit:
            cheap, above = price, found
        else:
            dear, below = price, found
    return _between(options, below, above, limit)


def _between(options: Sequence[Options], below: Sequence[int], above: Sequence[int], limit: int) -> list[int]:
    """Positions between two choices of the same price, whose steps are equally good: each site in turn takes one."""
    points: list[np.ndarray] = []
    for option, low, high in zip(options, below, above, strict=True):
        hull = hull_steps(option.cost, option.loss)[0]
        inside = hull[(hull > low) & (hull <= max(low, high))]
        points.append(np.append(low, inside))
    extra = [np.diff(option.cost[at]) for option, at in zip(options, points, strict=True)]
    taken = climb(extra, [np.zeros(len(steps)) for steps in extra], limit - total_cost(options, below))
    return [int(at[count]) for at, count in zip(points, taken, strict=True)]


def _enumerate(options: Sequence[Options], price: float, mu: float = 2.0) -> list[int]:
    """The first position of the least mu / 2 loss + price cost of every site."""
    return [int(np.argmin(mu / 2 * option.loss + price * option.cost)) for option in options]
