"""What every site may become, and the moves that allocators make among these options."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from corank.budget.curve import Curve
from corank.budget.hull import hull_steps, improving
from corank.errors import CorankError

DENSE = -1
"""The rank that stands for the dense matrix in `Options`."""


class Options(NamedTuple):
    """What one site may become, cheapest first: admissible ranks whose form is smaller than dense, and dense.

    Attributes:
        rank: int64 [J]; `DENSE` for dense.
        cost: int64 [J], never falling.
        loss: float64 [J].
    """

    rank: np.ndarray
    cost: np.ndarray
    loss: np.ndarray

    def take(self, positions: np.ndarray | slice) -> Options:
        """Only some of them."""
        return Options(self.rank[positions], self.cost[positions], self.loss[positions])


def check_arguments(curves: Sequence[Curve], floor: float, multiple_of: int) -> None:
    """Refuse what no allocator can work with.

    Raises:
        CorankError: two curves of one site, or an argument out of range.
    """
    names = [curve.site for curve in curves]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CorankError(f"There are several curves for {twice!r}; give one per site.")
    if not (math.isfinite(floor) and floor >= 0):
        raise CorankError(f"floor={floor} is not a fraction of the uniform rank; 0.3 to 0.5 is usual.")
    if multiple_of < 1:
        raise CorankError(f"multiple_of={multiple_of} must be at least 1; 8 or 16 suits tensor cores.")


def options_of(curve: Curve, multiple_of: int = 1) -> Options:
    """All options of a site; multiples do not forbid full rank and dense."""
    allowed = (curve.ranks % multiple_of == 0) | (curve.ranks == min(curve.shape))
    smaller = allowed & (curve.cost < curve.dense_cost)
    return Options(
        np.append(curve.ranks[smaller], DENSE),
        np.append(curve.cost[smaller], curve.dense_cost),
        np.append(curve.loss[smaller], 0.0),
    )


def prepare(curves: Sequence[Curve], limit: int, floor: float, multiple_of: int) -> list[Options]:
    """The options of an allocator that looks at losses: arguments checked, floors respected, feasible.

    Raises:
        CorankError: the limit cannot be met (the smallest possible size is named), a loss is NaN or infinite, or an
            argument is out of range.
    """
    check_arguments(curves, floor, multiple_of)
    for curve in curves:
        if not np.isfinite(curve.loss).all():
            raise CorankError(f"The losses of {curve.site!r} are not all finite; use allocator 'uniform'.")
    options = [options_of(curve, multiple_of) for curve in curves]
    if floor:
        options = above_floor(options, uniform_choice(options, limit), floor)
        require(options, limit, "lower the floor, ")
    else:
        require(options, limit)
    return options


def worthwhile(options: Sequence[Options]) -> list[Options]:
    """Without the options that lose no less than a cheaper one: money spent there would be wasted."""
    return [option.take(improving(option.cost, option.loss)) for option in options]


def require(options: Sequence[Options], limit: int, remedy: str = "") -> None:
    """Refuse a limit below the sum of the cheapest options.

    Raises:
        CorankError: naming the smallest possible size, and the remedy before the usual ones.
    """
    smallest = sum(int(option.cost[0]) for option in options)
    if smallest > limit:
        raise CorankError(
            f"The budget of {limit:,} parameters over {len(options)} sites cannot be met; the smallest "
            f"possible size is {smallest:,}: {remedy}raise the budget or select other sites."
        )


def total_cost(options: Sequence[Options], chosen: Sequence[int]) -> int:
    """Stored values of a choice."""
    return sum(int(option.cost[at]) for option, at in zip(options, chosen, strict=True))


def total_loss(options: Sequence[Options], chosen: Sequence[int]) -> float:
    """Sum of the predicted losses of a choice."""
    return math.fsum(float(option.loss[at]) for option, at in zip(options, chosen, strict=True))


def ranks_of(curves: Sequence[Curve], options: Sequence[Options], chosen: Sequence[int]) -> dict[str, int | None]:
    """An allocator's answer: site -> rank, or None for dense."""
    ranks = [int(option.rank[at]) for option, at in zip(options, chosen, strict=True)]
    return {c.site: None if rank == DENSE else rank for c, rank in zip(curves, ranks, strict=True)}


def uniform_choice(options: Sequence[Options], limit: int) -> list[int]:
    """Positions of the uniform choice: every site the largest option within its share f of its dense cost.

    Sites that have nothing so small take their cheapest option, and the others share what is left.

    Raises:
        CorankError: the limit cannot be met.
    """
    require(options, limit)
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


def above_floor(options: Sequence[Options], uniform: Sequence[int], floor: float) -> list[Options]:
    """Without the ranks below ``floor`` times the uniform one, whose positions are given."""
    part = Fraction(str(floor))
    kept = []
    for option, at in zip(options, uniform, strict=True):
        # The uniform rank of a site that is uniformly dense is its largest one below dense.
        rank = option.rank[at] if option.rank[at] != DENSE or len(option.rank) == 1 else option.rank[at - 1]
        least = math.ceil(part * max(int(rank), 0))
        kept.append(option.take(slice(int(np.searchsorted(option.rank[:-1], least)), None)))
    return kept


def climb(extra: Sequence[np.ndarray], key: Sequence[np.ndarray], left: int) -> np.ndarray:
    """Take the steps of all sites in one common order, each site's up to its first step that does not fit.

    Args:
        extra: for each site int64 [steps], the cost of each step.
        key: for each site float64 [steps], never falling; steps are taken by ascending key. Equal keys go round the
            sites step by step, so that equal sites get equal ranks.
        left: what the steps may cost together.

    Returns:
        int64 [sites], the number of steps taken.
    """
    taken = np.zeros(len(extra), dtype=np.int64)
    if not len(extra):
        return taken
    site = np.repeat(np.arange(len(extra)), [len(steps) for steps in extra])
    step = np.concatenate([np.arange(len(steps)) for steps in extra])
    price = np.concatenate(list(extra))
    order = np.lexsort((step, np.concatenate(list(key))))
    while len(order):
        fits = int(np.searchsorted(np.cumsum(price[order]), left, side="right"))
        now, order = order[:fits], order[fits:]
        taken += np.bincount(site[now], minlength=len(extra))
        left -= int(price[now].sum())
        # The room only shrinks: a step that does not fit now never will, and ends its site.
        end = np.full(len(extra), np.iinfo(np.int64).max)
        too_large = order[price[order] > left]
        np.minimum.at(end, site[too_large], step[too_large])
        order = order[step[order] < end[site[order]]]
    return taken


def along_hulls(options: Sequence[Options], limit: int) -> list[int]:
    """Positions after taking the steps along the lower convex hulls, steepest first, as long as they fit."""
    hulls = [hull_steps(option.cost, option.loss) for option in options]
    extra = [np.diff(option.cost[points]) for option, (points, _) in zip(options, hulls, strict=True)]
    left = limit - total_cost(options, [int(points[0]) for points, _ in hulls])
    taken = climb(extra, [slopes for _, slopes in hulls], left)
    return [int(points[count]) for (points, _), count in zip(hulls, taken, strict=True)]


def fill(options: Sequence[Options], start: Sequence[int], limit: int) -> list[int]:
    """Spend what is left, one upgrade of one site at a time, most loss saved per parameter first."""
    chosen = list(start)
    left = limit - total_cost(options, chosen)

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


def nearest_below(options: Sequence[Options], shares: np.ndarray, limit: int) -> list[int]:
    """Positions for real shares of the parameters: rounded down, then up by largest remainder until nothing fits.

    Args:
        options: of each site; costs strictly ascending (see `worthwhile`).
        shares: float64 [sites], parameters meant for each site, together at most ``limit``.
        limit: stored values allowed over all sites.
    """
    # A share may exceed an attainable cost by rounding alone; what this takes off comes back as the largest remainder.
    shares = shares * (1 - 1e-12)
    chosen = [
        max(int(np.searchsorted(option.cost, share, side="right")) - 1, 0)
        for option, share in zip(options, shares, strict=True)
    ]
    left = limit - total_cost(options, chosen)

    def behind(i: int) -> tuple[float, int, int] | None:
        if chosen[i] + 1 == len(options[i].cost):
            return None
        here, above = (int(cost) for cost in options[i].cost[chosen[i] : chosen[i] + 2])
        return -(float(shares[i]) - here) / (above - here), i, above - here

    queue = [entry for i in range(len(options)) if (entry := behind(i)) is not None]
    heapq.heapify(queue)
    while queue:
        _, i, extra = heapq.heappop(queue)
        if extra <= left:  # otherwise it never will: the room only shrinks
            chosen[i] += 1
            left -= extra
            entry = behind(i)
            if entry is not None:
                heapq.heappush(queue, entry)
    return chosen
