"""The C step of rank learning: an exact enumeration at a price, and the price that a budget means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_curves import (
    check_choices,
    least_loss,
    low_rank,
    options_of,
    problems,
    spectrum_curve,
    total_cost,
    total_loss,
)

from corank.budget.c_step import c_step, lc_rank


@settings(max_examples=80, deadline=None)
@given(problem=problems(), price=st.floats(0, 30), mu=st.sampled_from([0.5, 2.0, 3.0]), multiple_of=st.integers(1, 3))
def test_at_a_price_every_site_takes_what_is_best_for_it(problem, price, mu, multiple_of):
    curves, _ = problem
    ranks = c_step(curves, price, mu=mu, multiple_of=multiple_of)
    check_choices(curves, ranks, 10**9, multiple_of)
    for curve in curves:
        mine = mu / 2 * curve.loss_at(ranks[curve.site]) + price * curve.cost_at(ranks[curve.site])
        best = min(mu / 2 * loss + price * cost for cost, loss in options_of(curve, multiple_of))
        assert mine == pytest.approx(best, rel=1e-12, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), prices=st.lists(st.floats(0, 40), min_size=2, max_size=6))
def test_no_rank_rises_with_the_price_and_nothing_is_lost_for_free(problem, prices):
    curves, _ = problem
    costs = [[c.cost_at(ranks[c.site]) for c in curves] for ranks in (c_step(curves, p) for p in sorted(prices))]
    for cheaper, dearer in zip(costs[:-1], costs[1:], strict=True):
        assert all(a >= b for a, b in zip(cheaper, dearer, strict=True))
    free = c_step(curves, 0.0)
    assert total_loss(curves, free) == math.fsum(min(loss for _, loss in options_of(c)) for c in curves)


def test_at_price_zero_the_rank_is_full():
    full = spectrum_curve("full", (9, 7), low_rank, np.arange(1, 8))
    deficient = spectrum_curve("deficient", (20, 20), low_rank, [3, 2, 1] + [0] * 17)
    assert c_step([full, deficient], 0.0) == {"full": None, "deficient": 3}
    assert c_step([full, deficient], 1e9) == {"full": 0, "deficient": 0}


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_where_the_price_alone_decides_the_loss_is_the_least_there_is(problem):
    """By duality: what minimises loss + price cost has the least loss of all choices that cost no more."""
    curves, limit = problem
    ranks = lc_rank(curves, limit)
    check_choices(curves, ranks, limit)
    for price in (0.1, 1.0, 3.7):
        alone = c_step(curves, price)
        cost = total_cost(curves, alone)
        assert total_loss(curves, alone) == pytest.approx(least_loss(curves, cost), abs=1e-9)
        assert total_loss(curves, lc_rank(curves, cost)) <= total_loss(curves, alone) + 1e-9


def test_the_price_is_that_of_the_last_component_bought():
    """Two spectra, equal costs: the largest components of both, in one order."""
    curves = [
        spectrum_curve("a", (40, 40), low_rank, 2.0 ** -np.arange(40)),
        spectrum_curve("b", (40, 40), low_rank, 0.9 * 3.0 ** -np.arange(40)),
    ]
    both = sorted([(2.0**-i, "a") for i in range(40)] + [(0.9 * 3.0**-i, "b") for i in range(40)], reverse=True)
    for count in (1, 5, 12, 25):
        wanted = {site: sum(name == site for _, name in both[:count]) for site in "ab"}
        assert lc_rank(curves, 80 * count) == wanted
        assert lc_rank(curves, 80 * count + 79) == wanted
