"""The dynamic programme against one over every whole cost, and against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_curves import (
    check_choices,
    largest_hull_gain,
    least_loss,
    low_rank,
    options_of,
    pivoted,
    problems,
    spectrum_curve,
    total_cost,
    total_loss,
)

from corank.budget import ALLOCATORS, Curve, lagrange

knapsack = ALLOCATORS["knapsack"]


@settings(max_examples=80, deadline=None)
@given(problem=problems(), multiple_of=st.integers(1, 3))
def test_the_least_loss(problem, multiple_of):
    curves, limit = problem
    ranks = knapsack(curves, limit, multiple_of=multiple_of)
    assert total_loss(curves, ranks) == pytest.approx(least_loss(curves, limit, multiple_of), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(problem=problems(max_side=4, max_sites=4))
def test_nothing_that_can_be_tried_is_better(problem):
    curves, limit = problem
    choices = itertools.product(*(options_of(curve) for curve in curves))
    best = min(sum(l for _, l in points) for points in choices if sum(c for c, _ in points) <= limit)
    assert total_loss(curves, knapsack(curves, limit)) == pytest.approx(best, abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(problem=problems(), bins=st.integers(1, 40))
def test_with_few_bins_never_above_the_limit_and_never_worse_than_lagrange(problem, bins):
    curves, limit = problem
    ranks = knapsack(curves, limit, bins=bins)
    check_choices(curves, ranks, limit)
    loss = total_loss(curves, ranks)
    assert least_loss(curves, limit) - 1e-9 <= loss <= total_loss(curves, lagrange(curves, limit)) * (1 + 1e-12)
    assert loss - least_loss(curves, limit) <= largest_hull_gain(curves) + 1e-9


def test_costs_with_a_common_divisor_need_few_bins():
    """Ranks of 32 x 32 matrices cost 64 each: 3 x 1024 parameters are 48 units."""
    energy = np.random.default_rng(1).random((3, 32)) ** 3
    curves = [spectrum_curve(f"s{i}", (32, 32), low_rank, e) for i, e in enumerate(energy)]
    for limit in (700, 1500, 2500):
        ranks = knapsack(curves, limit, bins=48)
        assert total_loss(curves, ranks) == pytest.approx(least_loss(curves, limit), rel=1e-12)
        assert ranks == knapsack(curves, limit)


def test_it_finds_what_the_greedy_answer_cannot():
    """The small step pays better per parameter, but then the large one, which saves more, does not fit any more."""
    large = Curve("large", (4, 4), [0], [6.0], [0], 4)
    small = Curve("small", (4, 4), [0], [2.0], [0], 1)
    assert lagrange([large, small], 4) == {"large": 0, "small": None}
    assert knapsack([large, small], 4) == {"large": None, "small": 0}


def test_many_sites_fit_into_the_default_bins():
    rng = np.random.default_rng(0)
    curves = [spectrum_curve(f"s{i}", (64, 48 + i), pivoted, rng.random(48) ** rng.uniform(1, 9)) for i in range(40)]
    limit = sum(curve.dense_cost for curve in curves) * 6 // 10
    ranks = knapsack(curves, limit)
    assert limit - 200 < total_cost(curves, ranks) <= limit
    assert total_loss(curves, ranks) <= total_loss(curves, lagrange(curves, limit))
