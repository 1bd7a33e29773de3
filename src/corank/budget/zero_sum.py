"""Zero-sum truncation: remove components so that their first-order effects on the loss cancel."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from corank.budget.curve import Curve
from corank.budget.options import DENSE, Options, fill, prepare, ranks_of, total_cost, worthwhile

Step = tuple[float, int, int]
"""(first-order change of the loss, what it saves, position among the options afterwards)."""


def zero_sum(curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1) -> dict[str, int | None]:
    """Remove components of alternating sign, those of the smallest effect first, until the budget is met (ZS-SVD).

    "Zero Sum SVD", arXiv:2602.02848. Every site offers its smallest remaining component. While the sum of the
    first-order changes so far is not positive, the offer with the smallest change of at least 0 is taken, else the one
    with the smallest magnitude below 0; if there is none of that sign, the other. So the sum never leaves 0 by more
    than the largest single change, as long as there are offers of both signs. Removing components above the break-even
    rank saves nothing yet; a site that ends there stays dense. What the last removal leaves over is given back to the
    single upgrades that save most predicted loss.

    Args:
        curves: one per site, with `first_order`; of curves without it the loss takes its place, all of one sign.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted), and removed that many at a time.

    Returns:
        site -> rank, or None for dense.

    Raises:
        CorankError: as in `lagrange`.
    """
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    chosen = [len(option.rank) - 1 for option in options]
    over = total_cost(options, chosen) - limit
    ladders = [_ladder(curve, option, multiple_of) for curve, option in zip(curves, options, strict=True)]
    offers: dict[bool, list[tuple[float, int, int, Step]]] = {True: [], False: []}

    def offer(site: int, taken: int) -> None:
        step = next(ladders[site], None)
        if step is not None:  # among equals the site that has lost least goes first, so that equal sites stay equal
            heapq.heappush(offers[step[0] >= 0], (abs(step[0]), taken, site, step))

    for site in range(len(curves)):
        offer(site, 0)
    drift = 0.0
    while over > 0:
        heap = offers[drift <= 0] or offers[drift > 0]
        _, taken, site, (change, saved, at) = heapq.heappop(heap)
        drift += change
        over -= saved
        chosen[site] = at
        offer(site, taken + 1)
    return ranks_of(curves, options, fill(options, chosen, limit))


def _ladder(curve: Curve, option: Options, multiple_of: int) -> Iterator[Step]:
    """The removals of a site one after the other, from its last option down to its first."""
    change = curve.loss if curve.first_order is None else curve.first_order
    at = np.searchsorted(curve.ranks, option.rank)  # meaningless for dense, which has no rank
    last = len(option.rank) - 1
    here = 0.0 if option.rank[last] == DENSE else float(change[at[last]])
    if option.rank[last] == DENSE:
        above = curve.ranks > (option.rank[last - 1] if last else curve.ranks[-1] if len(curve.ranks) else 0)
        whole = (curve.ranks % multiple_of == 0) & above & (curve.ranks < min(curve.shape))
        for position in np.flatnonzero(whole)[::-1]:  # ranks that are no smaller than dense: nothing is saved yet
            yield float(change[position]) - here, 0, last
            here = float(change[position])
    for position in range(last - 1, -1, -1):
        there = float(change[at[position]])
        yield there - here, int(option.cost[position + 1] - option.cost[position]), position
        here = there
