"""Allocators against exact knapsack solutions, and what must hold for any curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_curves import (
    KINDS,
    check_choices,
    convex_curve,
    cur,
    largest_hull_gain,
    least_loss,
    low_rank,
    options_of,
    pivoted,
    pivoted_values,
    problems,
    spectrum_curve,
    total_cost,
    total_loss,
)

from corank.budget import ALLOCATORS, Curve, allocator, count_break_even, lagrange, uniform
from corank.errors import CorankError

#: those that need losses
INFORMED = sorted(set(ALLOCATORS) - {"uniform"})


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@settings(max_examples=60, deadline=None)
@given(problem=problems(), multiple_of=st.integers(1, 3), floor=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_never_above_the_limit(name, problem, multiple_of, floor):
    curves, limit = problem
    ranks = ALLOCATORS[name](curves, limit, floor=floor, multiple_of=multiple_of)
    check_choices(curves, ranks, limit, multiple_of)


@pytest.mark.parametrize("name", INFORMED)
@settings(max_examples=60, deadline=None)
@given(problem=problems(), multiple_of=st.integers(1, 3))
def test_no_room_is_left_for_any_upgrade(name, problem, multiple_of):
    """Hence the cost is at least the limit minus the largest step, unless nothing more can be saved."""
    curves, limit = problem
    ranks = ALLOCATORS[name](curves, limit, multiple_of=multiple_of)
    left = limit - total_cost(curves, ranks)
    for curve in curves:
        cost, loss = curve.cost_at(ranks[curve.site]), curve.loss_at(ranks[curve.site])
        for other_cost, other_loss in options_of(curve, multiple_of):
            if cost < other_cost <= cost + left:
                assert other_loss >= loss


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_lagrange_is_within_one_hull_step_of_the_least_loss(problem):
    curves, limit = problem
    loss = total_loss(curves, lagrange(curves, limit))
    best = least_loss(curves, limit)
    assert loss >= best - 1e-9
    assert loss - best <= largest_hull_gain(curves) + 1e-9


@settings(max_examples=100, deadline=None)
@given(
    gains=st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=8), min_size=1, max_size=5),
    step=st.integers(1, 4),
    data=st.data(),
)
def test_lagrange_is_the_knapsack_optimum_on_convex_curves_with_equal_steps(gains, step, data):
    curves = [convex_curve(f"s{i}", g, step) for i, g in enumerate(gains)]
    limit = data.draw(st.integers(0, sum(c.dense_cost for c in curves)))
    assert total_loss(curves, lagrange(curves, limit)) == pytest.approx(least_loss(curves, limit), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    gains=st.lists(
        st.tuples(st.integers(1, 7), st.lists(st.integers(0, 20), min_size=1, max_size=5)),
        min_size=1,
        max_size=4,
    )
)
def test_lagrange_is_monotone_in_the_budget_on_convex_curves(gains):
    curves = [convex_curve(f"s{i}", g, step) for i, (step, g) in enumerate(gains)]
    losses = [
        total_loss(curves, lagrange(curves, limit)) for limit in range(sum(curve.dense_cost for curve in curves) + 1)
    ]
    assert losses[-1] == 0
    assert all(later <= earlier + 1e-9 for earlier, later in zip(losses[:-1], losses[1:], strict=True))


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_lagrange_is_worse_than_uniform_by_less_than_one_hull_step(problem):
    curves, limit = problem
    mine, even = total_loss(curves, lagrange(curves, limit)), total_loss(curves, uniform(curves, limit))
    assert mine <= even + largest_hull_gain(curves)


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@pytest.mark.parametrize("energy", ["decaying", "flat"])
@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("keep", [0.2, 0.37, 0.5])
def test_identical_curves_get_equal_ranks_within_one_step(name, energy, multiple_of, keep):
    spectrum = np.ones(64) if energy == "flat" else np.arange(1, 65) ** -0.3
    # Only ranks below break-even, and dense one step above: a jump to dense would break the symmetry.
    whole = [spectrum_curve(f"s{i}", (64, 64), low_rank, spectrum) for i in range(6)]
    curves = [Curve(c.site, c.shape, c.ranks[:28], c.loss[:28] - c.loss[28], c.cost[:28], c.cost[28]) for c in whole]
    dense = sum(curve.dense_cost for curve in curves)
    ranks = ALLOCATORS[name](curves, int(keep * dense), multiple_of=multiple_of)
    assert None not in ranks.values()
    assert max(ranks.values()) - min(ranks.values()) <= multiple_of
    assert max(ranks.values()) > 0


def test_more_loss_gets_more_rank():
    energy = np.geomspace(1, 1e-4, 32)
    curve = spectrum_curve("light", (32, 32), low_rank, energy)
    heavy = spectrum_curve("heavy", (32, 32), low_rank, energy * 5)
    ranks = lagrange([curve, heavy], 800)
    assert ranks["heavy"] > ranks["light"] > 0
    scaled = lagrange([curve.weighted(7.0), heavy.weighted(7.0)], 800)
    assert scaled == ranks  # the unit of the loss does not matter
    swapped = lagrange([curve.weighted(5.0), heavy.weighted(1 / 5)], 800)
    assert (swapped["light"], swapped["heavy"]) == (ranks["heavy"], ranks["light"])


def test_dense_is_taken_where_it_is_best():
    """A flat spectrum loses much below break-even, nothing when dense; a steep one is happy with little."""
    flat = spectrum_curve("flat", (16, 16), low_rank, np.ones(16))
    steep = spectrum_curve("steep", (16, 16), low_rank, np.geomspace(1, 1e-12, 16))
    limit = 256 + 3 * 32
    ranks = lagrange([flat, steep], limit)
    assert ranks["flat"] is None and ranks["steep"] == 3
    assert total_loss([flat, steep], ranks) == pytest.approx(least_loss([flat, steep], limit))


@pytest.mark.parametrize("name", INFORMED)
def test_a_rank_deficient_site_is_not_stored_dense(name):
    curve = spectrum_curve("s", (16, 16), low_rank, [4, 3, 2, 1] + [0] * 12)
    for limit in (128, 256, 10_000):
        assert ALLOCATORS[name]([curve], limit) == {"s": 4}
    full = spectrum_curve("t", (16, 16), low_rank, np.arange(1, 17))
    ranks = ALLOCATORS[name]([curve, full], 512)
    assert ranks == {"s": 4, "t": None}


@pytest.mark.parametrize("name", INFORMED)
@pytest.mark.parametrize("power", [-600, 600])
def test_the_unit_of_the_loss_does_not_matter(name, power):
    energy = np.random.default_rng(0).random((5, 20)) ** np.arange(1, 6)[:, None]
    curves = [
        spectrum_curve(f"s{i}", (20, 24), pivoted, e, role="qkvvv"[i], importance=i) for i, e in enumerate(energy)
    ]
    for limit in (500, 1000, 2000):
        expected = ALLOCATORS[name](curves, limit)
        assert ALLOCATORS[name]([curve.weighted(2.0**power) for curve in curves], limit) == expected


@pytest.mark.parametrize("name", INFORMED)
def test_matrices_of_zeros_take_nothing_from_the_others(name):
    zeros = [spectrum_curve(f"z{i}", (12, 12), low_rank, np.zeros(12)) for i in range(3)]
    other = spectrum_curve("s", (12, 12), low_rank, np.arange(1, 13))
    assert ALLOCATORS[name](zeros, 400) == {"z0": 0, "z1": 0, "z2": 0}
    assert ALLOCATORS[name]([*zeros, other], 100) == {"z0": 0, "z1": 0, "z2": 0, "s": 4}


@pytest.mark.parametrize("name", INFORMED)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_that_are_not_known_are_refused(name, bad):
    good = spectrum_curve("good", (4, 4), low_rank, [3, 2, 1, 1])
    with pytest.raises(CorankError, match="losses of 's' are not all finite; use allocator 'uniform'"):
        ALLOCATORS[name]([good, Curve.from_count("s", (4, 4), low_rank, [7, bad, 2, 1, 0])], 20)


def test_a_form_as_large_as_dense_is_not_used():
    curve = spectrum_curve("s", (4, 4), low_rank, [2, 1, 0, 0])  # rank 2 loses nothing but costs 16
    for name in ALLOCATORS:
        assert ALLOCATORS[name]([curve], 16) == {"s": None}
        assert ALLOCATORS[name]([curve], 15) == {"s": 1}


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_multiples_do_not_forbid_full_rank(name):
    cheap = Curve("s", (6, 6), np.arange(7), np.arange(7)[::-1], 3 * np.arange(7), 36)
    assert ALLOCATORS[name]([cheap], 17, multiple_of=4) == {"s": 4}
    assert ALLOCATORS[name]([cheap], 18, multiple_of=4) == {"s": 6}


def test_room_for_everything_makes_everything_dense():
    curves = [spectrum_curve(f"s{i}", (8, 12), pivoted, np.arange(1, 9)) for i in range(3)]
    dense = sum(curve.dense_cost for curve in curves)
    for name in ALLOCATORS:
        for limit in (dense, dense + 1000):
            assert set(ALLOCATORS[name](curves, limit).values()) == {None}
        assert set(ALLOCATORS[name](curves, dense - 1).values()) != {None}


def test_one_site_gets_the_largest_rank_that_fits():
    for count in KINDS.values():
        curve = spectrum_curve("s", (40, 30), count, np.arange(1, 31))
        for limit in (0, 69, 70, 500, 1199):
            expected = max(k for k in range(31) if count(40, 30, k) <= limit)
            for name in ALLOCATORS:
                assert ALLOCATORS[name]([curve], limit) == {"s": expected}


@pytest.mark.parametrize("name", INFORMED)
@settings(max_examples=40, deadline=None)
@given(problem=problems(max_side=12), floor=st.sampled_from([0.25, 0.3, 0.5, 1.0]), multiple_of=st.integers(1, 3))
def test_floor_is_a_fraction_of_the_uniform_rank(name, problem, floor, multiple_of):
    curves, limit = problem
    even = uniform(curves, limit, multiple_of=multiple_of)
    ranks = ALLOCATORS[name](curves, limit, floor=floor, multiple_of=multiple_of)
    for site, rank in ranks.items():
        if rank is not None and even[site] is not None:
            assert rank >= math.ceil(round(floor * even[site], 9))


def test_floor_keeps_a_worthless_site_alive():
    worthless = spectrum_curve("worthless", (32, 32), low_rank, np.full(32, 1e-9))
    precious = spectrum_curve("precious", (32, 32), low_rank, np.geomspace(1, 1e-3, 32))
    curves, limit = [worthless, precious], 1024
    assert uniform(curves, limit) == {"worthless": 8, "precious": 8}
    assert lagrange(curves, limit)["worthless"] == 0  # rank 0 is a legal answer
    assert lagrange(curves, limit, floor=0.5)["worthless"] == 4
    assert lagrange(curves, limit, floor=0.3)["worthless"] == 3  # ceil(2.4)
    assert lagrange(curves, limit, floor=0.5, multiple_of=8)["worthless"] == 8
    assert lagrange(curves, limit, floor=1.0) == {"worthless": 8, "precious": 8}


def test_infeasible_floor_names_the_smallest_possible_size():
    curves = [spectrum_curve(f"s{i}", (32, 32), low_rank, np.arange(1, 33)) for i in range(2)]
    assert uniform(curves, 1024) == {"s0": 8, "s1": 8}
    for name in ALLOCATORS:
        with pytest.raises(CorankError, match=r"smallest possible size is 1,280.*floor"):
            ALLOCATORS[name](curves, 1024, floor=1.25)  # rank 10 twice


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_impossible_budget_names_the_smallest_possible_size(name):
    curves = [spectrum_curve(f"s{i}", (10, 10), low_rank, np.arange(1, 11)) for i in range(3)]
    curves = [Curve(c.site, c.shape, c.ranks[2:], c.loss[2:], c.cost[2:], c.dense_cost) for c in curves]
    assert total_cost(curves, ALLOCATORS[name](curves, 120)) == 120
    with pytest.raises(CorankError, match=r"budget of 119 .*smallest possible size is 120"):
        ALLOCATORS[name](curves, 119)
    with pytest.raises(CorankError, match=r"smallest possible size is 240"):
        ALLOCATORS[name](curves, 239, multiple_of=4)
    with pytest.raises(CorankError, match="smallest possible size is 0"):
        ALLOCATORS[name]([spectrum_curve("s", (2, 2), low_rank, [1, 1])], -1)


def test_sites_that_can_only_be_dense_are_paid_first():
    tiny = Curve("tiny", (1, 5), np.array([1]), np.array([0.0]), np.array([6]), 5)  # 1 (1 + 5) > 5
    large = spectrum_curve("large", (10, 10), low_rank, np.arange(1, 11))
    for name in ALLOCATORS:
        assert ALLOCATORS[name]([tiny, large], 45) == {"tiny": None, "large": 2}


@settings(max_examples=100, deadline=None)
@given(problem=problems(max_side=12))
def test_multiples_are_allocated_as_well_as_any_other_ranks(problem):
    curves, limit = problem
    ranks = lagrange(curves, limit, multiple_of=4)
    check_choices(curves, ranks, limit, multiple_of=4)
    best = least_loss(curves, limit, multiple_of=4)
    assert best - 1e-9 <= total_loss(curves, ranks) <= best + largest_hull_gain(curves, 4) + 1e-9


def shape_curve(m, n, count):
    return Curve.from_count("s", (m, n), count)


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        ((4096, 4096), low_rank, (1638, 1433, 1228, 1024)),
        ((11008, 4096), low_rank, (2388, 2089, 1791, 1492)),
        ((14336, 4096), low_rank, (2548, 2230, 1911, 1592)),
        ((1024, 4096), low_rank, (655, 573, 491, 409)),
        ((4096, 4096), pivoted_values, (2264, 1852, 1505, 1199)),
        ((11008, 4096), pivoted_values, (2973, 2505, 2076, 1679)),
        # The indices count as well.
        ((4096, 4096), pivoted, (2263, 1852, 1505, 1199)),
        ((11008, 4096), pivoted, (2973, 2504, 2076, 1679)),
    ],
)
def test_uniform_gives_the_published_ranks(shape, count, expected):
    m, n = shape
    curve = shape_curve(m, n, count)
    for removed, rank in zip((20, 30, 40, 50), expected, strict=True):
        limit = m * n * (100 - removed) // 100
        assert uniform([curve], limit) == {"s": rank}


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6),
    percent=st.integers(1, 99),
)
def test_uniform_is_the_closed_form(shapes, percent):
    """floor(f m n / (m + n)) with f = limit / sum(m n), losses unknown."""
    curves = [Curve.from_count(f"s{i}", shape, low_rank) for i, shape in enumerate(shapes)]
    dense = sum(m * n for m, n in shapes)
    limit = percent * dense // 100
    ranks = uniform(curves, limit)
    for i, (m, n) in enumerate(shapes):
        assert ranks[f"s{i}"] == limit * m * n // (dense * (m + n))


@pytest.mark.parametrize("f", [0.1, 0.37, 0.5, 0.8])
def test_uniform_pivoted_closed_form(f):
    m, n = 300, 200
    s = m + n + 1
    root = (s - math.sqrt(s * s - 4 * f * m * n)) / 2
    assert uniform([shape_curve(m, n, pivoted)], int(f * m * n)) == {"s": math.floor(root)}


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        ((4096, 4096), low_rank, 2047),  # 2048 costs exactly as much as dense
        ((1024, 4096), low_rank, 819),
        ((11008, 4096), low_rank, 2985),
        ((4096, 4096), cur, 1696),
        ((1024, 4096), cur, 718),
        ((14336, 4096), cur, 2769),
        ((1, 1), low_rank, 0),
    ],
)
def test_break_even_rank(shape, count, expected):
    m, n = shape
    rank = count_break_even(shape, count)
    assert rank == expected
    assert count(m, n, rank) < m * n <= count(m, n, rank + 1)


def test_pivoted_break_even_is_close_to_full_rank():
    for m, n in [(40, 30), (64, 64), (3, 500)]:
        rank = count_break_even((m, n), pivoted)
        assert rank == max(k for k in range(min(m, n) + 1) if pivoted(m, n, k) < m * n)
        assert rank < min(m, n)  # at full rank the indices come on top


def test_bad_arguments_are_explained():
    curve = spectrum_curve("s", (4, 4), low_rank, [3, 2, 1, 1])
    with pytest.raises(CorankError, match="nearest: lagrange"):
        allocator("lagrang")
    with pytest.raises(CorankError, match="several curves for 's'"):
        lagrange([curve, curve], 20)
    with pytest.raises(CorankError, match="uniform"):
        lagrange([shape_curve(4, 4, low_rank)], 20)
    for name in ALLOCATORS:
        with pytest.raises(CorankError, match="floor"):
            ALLOCATORS[name]([curve], 20, floor=-0.1)
        with pytest.raises(CorankError, match="multiple_of"):
            ALLOCATORS[name]([curve], 20, multiple_of=0)
        assert ALLOCATORS[name]([], 0) == {}
