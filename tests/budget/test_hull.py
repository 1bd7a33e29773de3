"""The hull against its definition: below all points, touching them, convex."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from corank.budget.hull import hull_steps


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), min_size=1, max_size=25))
def test_hull_is_the_greatest_convex_minorant(points):
    points = sorted(points, key=lambda point: point[0])  # equal costs in any order
    cost = np.array([c for c, _ in points])
    loss = np.array([float(l) for _, l in points])
    at, slopes = hull_steps(cost, loss)
    assert cost[at[0]] == cost.min() and loss[at[0]] == loss[cost == cost.min()].min()
    assert loss[at[-1]] == loss.min()
    assert (np.diff(cost[at]) > 0).all() and (np.diff(loss[at]) < 0).all()
    assert (slopes < 0).all() and (np.diff(slopes) >= 0).all()
    np.testing.assert_allclose(slopes, np.diff(loss[at]) / np.diff(cost[at]), rtol=1e-9)
    # No point lies below; past the last one the least loss goes on.
    assert (loss >= np.interp(cost, cost[at], loss[at]) - 1e-9).all()


def test_points_on_a_straight_stretch_are_kept():
    at, slopes = hull_steps(np.arange(0, 50, 5), np.linspace(3, 0, 10))
    assert at.tolist() == list(range(10))
    np.testing.assert_allclose(slopes, -1 / 15, rtol=1e-12)
