"""The lower convex hull of cost and loss: the exchanges worth making, in the order in which they pay."""

from __future__ import annotations

import numpy as np
from scipy.optimize import isotonic_regression

# Points above the hull by less than this part of its height count as on it. Without them a straight stretch
# of the curve would be one large all-or-nothing step.
_ON_HULL = 1e-12


def improving(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Points that lose less than every cheaper one, and least among those of their cost.

    Args:
        cost: int64 [K], not falling.
        loss: float64 [K].

    Returns:
        int64 [p], indices: cost strictly rising, loss strictly falling.
    """
    below_all_before = np.ones(len(loss), dtype=bool)
    below_all_before[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
    points = np.flatnonzero(below_all_before)
    last_at_this_cost = np.append(np.diff(cost[points]) > 0, True)
    return points[last_at_this_cost]


def hull_steps(cost: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points on the lower convex hull of {(cost, loss)}, from the cheapest to the least loss, and its slopes.

    The hull is the greatest convex minorant, whose slopes are the isotonic regression of the slopes between
    neighbours weighted by their widths (Barlow et al. 1972): linear time.

    Args:
        cost: int64 [K], not falling.
        loss: float64 [K].

    Returns:
        points int64 [p], indices of the points on the hull, loss strictly falling; slopes float64 [p-1],
        loss per unit of cost of the step between two points, negative and never falling.
    """
    points = improving(cost, loss)
    if len(points) == 1:
        return points, np.empty(0)
    c, l = cost[points].astype(np.float64), loss[points]
    fit = isotonic_regression(np.diff(l) / np.diff(c), weights=np.diff(c))
    vertices = np.asarray(fit.blocks, dtype=np.int64)
    hull = np.interp(c, c[vertices], l[vertices])
    on_hull = l - hull <= _ON_HULL * (l[0] - l[-1])
    on_hull[vertices] = True
    return points[on_hull], np.asarray(fit.x)[np.flatnonzero(on_hull)[:-1]]
