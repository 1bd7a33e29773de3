"""Who gets which rank.

An allocator is a function ``(curves, limit, *, floor, multiple_of) -> {site: rank, or None for dense}``.
The sum of costs never exceeds the limit; a site whose factored form would not be smaller than the dense
matrix stays dense; nothing is assumed of how the cost grows with the rank. Those that look at losses refuse curves
without them, spend nothing where nothing is saved, and leave less than one step of the limit unspent otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from corank.budget.bayesian import bolaco
from corank.budget.c_step import lc_rank
from corank.budget.curve import Curve
from corank.budget.knapsack import knapsack
from corank.budget.options import (
    above_floor,
    along_hulls,
    check_arguments,
    fill,
    options_of,
    prepare,
    ranks_of,
    require,
    uniform_choice,
)
from corank.budget.shares import d_rank, inv_log_loss, swift_svd
from corank.budget.threshold import strs, threshold, welore
from corank.budget.zero_sum import zero_sum
from corank.errors import CorankError, unknown

Allocator = Callable[..., dict[str, int | None]]


def uniform(curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1) -> dict[str, int | None]:
    """The same fraction f = limit / sum(dense cost) of every site: largest rank with cost <= f dense cost.

    Sites that have nothing so small take their smallest form, and the others share what is left. Only costs
    are used, losses may be NaN.

    Args:
        curves: one per site.
        limit: stored values allowed over all sites.
        floor: accepted for the common signature; up to 1 it is met by construction.
        multiple_of: ranks are multiples of this (full rank and dense excepted).

    Returns:
        site -> rank, or None for dense; all dense where f >= 1.

    Raises:
        CorankError: the limit cannot be met, or an argument is out of range.
    """
    check_arguments(curves, floor, multiple_of)
    options = [options_of(curve, multiple_of) for curve in curves]
    chosen = uniform_choice(options, limit)
    if floor > 1:
        require(above_floor(options, chosen, floor), limit, "lower the floor, ")
        raise CorankError(f"floor={floor} is above the uniform rank itself; give a floor of at most 1.")
    return ranks_of(curves, options, chosen)


def lagrange(curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1) -> dict[str, int | None]:
    """The least total loss within the limit: greedy along convex hulls, then a fill.

    Every site starts at its cheapest option. All steps along the lower convex hulls of {(cost, loss)}, dense
    included, are taken in the order of loss saved per parameter, as long as they fit (a site is left alone
    after its first refused step). What is left is spent on the best single upgrades, on the hull or not,
    until nothing fits.

    The loss exceeds the optimum by at most the largest loss saved by one hull step. On convex curves it never
    rises with the limit, and with equal steps it is the optimum. O(N log N) for N options in all.

    Args:
        curves: one per site; losses of different sites are added, so they must be in one currency.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).

    Returns:
        site -> rank, or None for dense.

    Raises:
        CorankError: the limit cannot be met (the smallest possible size is named), a loss is NaN or
            infinite, or an argument is out of range.
    """
    options = prepare(curves, limit, floor, multiple_of)
    return ranks_of(curves, options, fill(options, along_hulls(options, limit), limit))


def learned(
    curves: Sequence[Curve],
    limit: int,
    *,
    floor: float = 0.0,
    multiple_of: int = 1,
    ranks: Mapping[str, int | None] | None = None,
) -> dict[str, int | None]:
    """Ranks that have been chosen already, from a score map (`corank.gates.components`); without one, those of `strs`.

    Raises:
        CorankError: as in `lagrange`.
    """
    return strs(curves, limit, floor=floor, multiple_of=multiple_of) if ranks is None else dict(ranks)


ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform,
    "lagrange": lagrange,
    "knapsack": knapsack,
    "lc-rank": lc_rank,
    "inv-log-loss": inv_log_loss,
    "d-rank": d_rank,
    "swift-svd": swift_svd,
    "threshold": threshold,
    "strs": strs,
    "welore": welore,
    "lems": lagrange,
    "asvd-search": strs,
    "bolaco": bolaco,
    "zs-svd": zero_sum,
    "ara": strs,
    "dobi-svd": strs,
    "acip": learned,
}

MEASURED = frozenset({"lems", "asvd-search", "bolaco", "zs-svd", "ara", "dobi-svd", "acip"})
"""Those whose curves, or whose judge, the engine first measures on the model itself (`corank.probing`)."""


def allocator(name: str) -> Allocator:
    """Look an allocator up; an unknown name raises CorankError with the nearest ones."""
    if name not in ALLOCATORS:
        raise unknown("allocator", name, ALLOCATORS)
    return ALLOCATORS[name]
