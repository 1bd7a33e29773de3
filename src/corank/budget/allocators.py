"""Who gets which rank.

An allocator is a function ``(curves, limit, *, floor, multiple_of) -> {site: rank, or None for dense}``.
The sum of costs never exceeds the limit; a site whose factored form would not be smaller than the dense
matrix stays dense; nothing is assumed of how the cost grows with the rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from corank.budget.curve import Curve
from corank.budget.hull import hull_steps
from corank.errors import CorankError, unknown

Allocator = Callable[..., dict[str, int | None]]

_DENSE = -1


class _Options(NamedTuple):
    """What one site may become, cheapest first; the last one is dense."""

    rank: np.ndarray
    cost: np.ndarray
    loss: np.ndarray


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
    _check(curves, floor, multiple_of)
    options = [_options(curve, multiple_of) for curve in curves]
    even = _even(options, limit)
    if floor > 1:
        _require(_above_floor(options, even, floor), limit, "lower the floor, ")
        raise CorankError(f"floor={floor} is above the uniform rank itself; give a floor of at most 1.")
    return _ranks(curves, options, even)


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
    _check(curves, floor, multiple_of)
    for curve in curves:
        if not np.isfinite(curve.loss).all():
            raise CorankError(f"The losses of {curve.site!r} are not all finite; use allocator 'uniform'.")
    options = [_options(curve, multiple_of) for curve in curves]
    if floor:
        options = _above_floor(options, _even(options, limit), floor)
        _require(options, limit, "lower the floor, ")
    else:
        _require(options, limit)
    return _ranks(curves, options, _fill(options, _greedy(options, limit), limit))


ALLOCATORS: dict[str, Allocator] = {"uniform": uniform, "lagrange": lagrange}


def allocator(name: str) -> Allocator:
    """Look an allocator up; an unknown name raises CorankError with the nearest ones."""
    if name not in ALLOCATORS:
        raise unknown("allocator", name, ALLOCATORS)
    return ALLOCATORS[name]


def _check(curves: Sequence[Curve], floor: float, multiple_of: int) -> None:
    names = [curve.site for curve in curves]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CorankError(f"There are several curves for {twice!r}; give one per site.")
    if not (math.isfinite(floor) and floor >= 0):
        raise CorankError(f"floor={floor} is not a fraction of the uniform rank; 0.3 to 0.5 is usual.")
    if multiple_of < 1:
        raise CorankError(f"multiple_of={multiple_of} must be at least 1; 8 or 16 suits tensor cores.")


def _options(curve: Curve, multiple_of: int) -> _Options:
    allowed = (curve.ranks % multiple_of == 0) | (curve.ranks == min(curve.shape))
    smaller = allowed & (curve.cost < curve.dense_cost)
    return _Options(
        np.append(curve.ranks[smaller], _DENSE),
        np.append(curve.cost[smaller], curve.dense_cost),
        np.append(curve.loss[smaller], 0.0),
    )


def _require(options: Sequence[_Options], limit: int, remedy: str = "") -> None:
    smallest = sum(int(option.cost[0]) for option in options)
    if smallest > limit:
        raise CorankError(
            f"The budget of {limit:,} parameters over {len(options)} sites cannot be met; the smallest "
            f"possible size is {smallest:,}: {remedy}raise the budget or select other sites."
        )


def _even(options: Sequence[_Options], limit: int) -> list[int]:
    """Positions of the uniform choice."""
    _require(options, limit)
    chosen = [0] * len(options)
    free = list(range(len(options)))
    while free:
        # Whole numbers throughout: f * dense_cost in floating point can fall short of an attainable cost.
        left = limit - sum(int(options[i].cost[0]) for i in set(range(len(options))).difference(free))
        dense = sum(int(options[i].cost[-1]) for i in free)
        share = {i: left * int(options[i].cost[-1]) // dense for i in free}
        fits = [i for i in free if options[i].cost[0] <= share[i]]
        if len(fits) == len(free):
            for i in free:
                chosen[i] = int(np.searchsorted(options[i].cost, share[i], side="right")) - 1
            break
        free = fits
    return chosen


def _above_floor(options: Sequence[_Options], even: list[int], floor: float) -> list[_Options]:
    part = Fraction(str(floor))
    kept = []
    for option, at in zip(options, even, strict=True):
        # The uniform rank of a site that is uniformly dense is its largest one below dense.
        rank = option.rank[at] if option.rank[at] != _DENSE or len(option.rank) == 1 else option.rank[at - 1]
        least = math.ceil(part * max(int(rank), 0))
        start = int(np.searchsorted(option.rank[:-1], least))
        kept.append(_Options(option.rank[start:], option.cost[start:], option.loss[start:]))
    return kept


def _greedy(options: Sequence[_Options], limit: int) -> list[int]:
    """Positions after taking hull steps, steepest first, each site up to its first step that does not fit."""
    hulls = [hull_steps(option.cost, option.loss) for option in options]
    chosen = [int(points[0]) for points, _ in hulls]
    if not hulls:
        return chosen
    left = limit - sum(int(option.cost[at]) for option, at in zip(options, chosen, strict=True))
    site = np.repeat(np.arange(len(hulls)), [len(slopes) for _, slopes in hulls])
    step = np.concatenate([np.arange(len(slopes)) for _, slopes in hulls])
    slope = np.concatenate([slopes for _, slopes in hulls])
    extra = np.concatenate([np.diff(o.cost[points]) for o, (points, _) in zip(options, hulls, strict=True)])
    # Equal slopes go round the sites step by step, so that equal sites get equal ranks.
    order = np.lexsort((step, slope))
    taken = np.zeros(len(hulls), dtype=np.int64)
    while len(order):
        fits = int(np.searchsorted(np.cumsum(extra[order]), left, side="right"))
        now, order = order[:fits], order[fits:]
        taken += np.bincount(site[now], minlength=len(hulls))
        left -= int(extra[now].sum())
        # The room only shrinks: a step that does not fit now never will, and ends its site.
        end = np.full(len(hulls), np.iinfo(np.int64).max)
        too_large = order[extra[order] > left]
        np.minimum.at(end, site[too_large], step[too_large])
        order = order[step[order] < end[site[order]]]
    return [int(points[count]) for (points, _), count in zip(hulls, taken, strict=True)]


def _fill(options: Sequence[_Options], start: Sequence[int], limit: int) -> list[int]:
    """Spend what is left, one upgrade of one site at a time, most loss saved per parameter first."""
    chosen = list(start)
    left = limit - sum(int(option.cost[at]) for option, at in zip(options, chosen, strict=True))

    def best(i: int) -> tuple[float, int, int] | None:
        cost, loss, at = options[i].cost, options[i].loss, chosen[i]
        end = int(np.searchsorted(cost, cost[at] + left, side="right"))
        saved = loss[at] - loss[at + 1 : end]
        rate = saved / np.maximum(cost[at + 1 : end] - cost[at], 1)
        if not len(rate) or rate.max() <= 0:
            return None
        return -float(rate.max()), i, at + 1 + int(rate.argmax())

    # The best rate of a site can only fall while the others spend, so an entry found stale is looked up
    # again.
    queue = [entry for i in range(len(options)) if (entry := best(i)) is not None]
    heapq.heapify(queue)
    while queue:
        _, i, to = heapq.heappop(queue)
        extra = int(options[i].cost[to] - options[i].cost[chosen[i]])
        if extra <= left:
            chosen[i] = to
            left -= extra
        entry = best(i)
        if entry is not None:
            heapq.heappush(queue, entry)
    return chosen


def _ranks(curves: Sequence[Curve], options: Sequence[_Options], chosen: Sequence[int]) -> dict[str, int | None]:
    ranks = [int(option.rank[at]) for option, at in zip(options, chosen, strict=True)]
    return {c.site: None if rank == _DENSE else rank for c, rank in zip(curves, ranks, strict=True)}
