"""ASVD's search: the perplexity of the model with one matrix truncated, measured on a grid of sizes.

Yuan et al., "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
arXiv:2312.05821: for every matrix and every ratio of a grid, truncate that matrix alone and measure the perplexity on
calibration text; then find the threshold at which every matrix, at its smallest ratio with a perplexity below it (or
dense), fits the budget. The ratio is the share of parameters kept, whatever the storage. Between the sizes of the grid the
log-perplexity is taken to be linear, so that the budget is used up to one rank and not to one step of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from corank.budget import Curve
from corank.probing.probe import Prober

GRID = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The paper's ratios."""
LOWER = (0.0, 0.1, 0.2, 0.3)
"""Added where less than half of the parameters may be kept: the paper's grid could not be met, or hardly."""


def measured(prober: Prober, curves: Sequence[Curve], limit: int, multiple_of: int = 1) -> list[Curve]:
    """The curves from the lowest rank of the grid on, with the measured rise of the log-perplexity as loss.

    Args:
        prober: measures.
        curves: one per site.
        limit: stored values allowed over all of them.
        multiple_of: ranks of the grid are rounded down to multiples of this.
    """
    grid = GRID if 2 * limit >= sum(curve.dense_cost for curve in curves) else LOWER + GRID
    wanted = [_positions(curve, grid, multiple_of) for curve in curves]
    changes = [{c.site: int(c.ranks[at])} for c, places in zip(curves, wanted, strict=True) for at in places]
    rises = iter(prober.effects(changes))
    found = []
    for curve, places in zip(curves, wanted, strict=True):
        rise = [min(next(rises).rise, 1e3) for _ in places]
        kept = slice(places[0], None) if places else slice(0, 0)
        sizes = [*curve.cost[places], curve.dense_cost]
        loss = np.interp(curve.cost[kept], sizes, [*rise, 0.0])
        found.append(replace(curve, ranks=curve.ranks[kept], cost=curve.cost[kept], loss=loss, first_order=None))
    return found


def _positions(curve: Curve, grid: Sequence[float], multiple_of: int) -> list[int]:
    """Positions on the curve of the largest admissible ranks that keep no more than each share of the parameters."""
    admissible = np.flatnonzero((curve.ranks % multiple_of == 0) & (curve.cost < curve.dense_cost))
    within = [admissible[curve.cost[admissible] <= share * curve.dense_cost] for share in grid]
    return sorted({int(at[-1]) for at in within if len(at)})
