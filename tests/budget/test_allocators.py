"""Allocators against exact knapsack solutions, and what must hold for any curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corank.budget import ALLOCATORS, Curve, allocator, count_break_even, lagrange, uniform
from corank.errors import CorankError


def low_rank(m, n, k):
    return k * (m + n)


def pivoted(m, n, k):
    return k * (m + n - k) + k


def pivoted_values(m, n, k):
    """Without the k indices."""
    return k * (m + n - k)


def cur(m, n, r):
    return r * (m + n) + r * r


KINDS = {"low_rank": low_rank, "pivoted": pivoted, "cur": cur}


def spectrum_curve(site, shape, count, energy):
    """Discarded energy at every rank."""
    energy = np.sort(np.asarray(energy, dtype=np.float64))[::-1]
    loss = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return Curve.from_count(site, shape, count, loss)


def convex_curve(site, gains, step=1):
    """Equal steps with falling gains, dense being the last of them: all points are on the hull."""
    gains = np.sort(np.asarray(gains, dtype=np.float64))[::-1]
    loss = np.append(np.cumsum(gains[::-1])[::-1], 0.0)
    p = len(gains)
    return Curve(site, (p, p), np.arange(p), loss[:-1], step * np.arange(p), step * p)


def total_cost(curves, ranks):
    return sum(curve.cost_at(ranks[curve.site]) for curve in curves)


def total_loss(curves, ranks):
    return math.fsum(curve.loss_at(ranks[curve.site]) for curve in curves)


def options_of(curve, multiple_of=1):
    """(cost, loss) of all admissible choices, straight from the definition."""
    points = [(curve.dense_cost, 0.0)]
    for rank, cost, loss in zip(curve.ranks, curve.cost, curve.loss, strict=True):
        whole = rank % multiple_of == 0 or rank == min(curve.shape)
        if whole and cost < curve.dense_cost:
            points.append((int(cost), float(loss)))
    return points


def knapsack(curves, limit, multiple_of=1):
    """Least loss by dynamic programming over every whole cost up to the limit."""
    best = np.zeros(limit + 1)
    for curve in curves:
        new = np.full(limit + 1, np.inf)
        for cost, loss in options_of(curve, multiple_of):
            if cost <= limit:
                new[cost:] = np.minimum(new[cost:], best[: limit + 1 - cost] + loss)
        best = new
    return best[limit]


def largest_hull_gain(curves, multiple_of=1):
    """Largest loss saved by one edge of a lower hull; hull found by trying every pair of points."""
    largest = 0.0
    for curve in curves:
        points = sorted(options_of(curve, multiple_of))
        at = min(points)
        while True:
            later = [p for p in points if p[0] > at[0] and p[1] < at[1]]
            if not later:
                break
            nxt = min(later, key=lambda p, at=at: ((p[1] - at[1]) / (p[0] - at[0]), -p[0]))
            largest = max(largest, at[1] - nxt[1])
            at = nxt
    return largest


@st.composite
def problems(draw, max_side=6, max_sites=5):
    curves = []
    for index in range(draw(st.integers(1, max_sites))):
        m, n = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
        count = KINDS[draw(st.sampled_from(sorted(KINDS)))]
        p = min(m, n)
        if draw(st.booleans()):
            energy = draw(st.lists(st.integers(0, 50), min_size=p, max_size=p))
            curves.append(spectrum_curve(f"s{index}", (m, n), count, energy))
        else:  # any shape at all: not monotone, not convex
            loss = draw(st.lists(st.integers(0, 100), min_size=p + 1, max_size=p + 1))
            curves.append(Curve.from_count(f"s{index}", (m, n), count, loss))
    dense = sum(curve.dense_cost for curve in curves)
    return curves, draw(st.integers(0, dense + 3))


def check_choices(curves, ranks, limit, multiple_of=1):
    assert set(ranks) == {curve.site for curve in curves}
    assert total_cost(curves, ranks) <= limit
    for curve in curves:
        rank = ranks[curve.site]
        if rank is not None:
            assert rank % multiple_of == 0 or rank == min(curve.shape)
            assert curve.cost_at(rank) < curve.dense_cost


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@settings(max_examples=100, deadline=None)
@given(problem=problems(), multiple_of=st.integers(1, 3), floor=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_never_above_the_limit(name, problem, multiple_of, floor):
    curves, limit = problem
    ranks = ALLOCATORS[name](curves, limit, floor=floor, multiple_of=multiple_of)
    check_choices(curves, ranks, limit, multiple_of)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), multiple_of=st.integers(1, 3))
def test_lagrange_leaves_no_room_for_any_upgrade(problem, multiple_of):
    """Hence the cost is at least the limit minus the largest step, unless nothing more can be saved."""
    curves, limit = problem
    ranks = lagrange(curves, limit, multiple_of=multiple_of)
    left = limit - total_cost(curves, ranks)
    for curve in curves:
        cost, loss = curve.cost_at(ranks[curve.site]), curve.loss_at(ranks[curve.site])
        for other_cost, other_loss in options_of(curve, multiple_of):
            if cost < other_cost <= cost + left:
                assert other_loss >= loss


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_lagrange_is_within_one_hull_step_of_the_knapsack(problem):
    curves, limit = problem
    loss = total_loss(curves, lagrange(curves, limit))
    best = knapsack(curves, limit)
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
    assert total_loss(curves, lagrange(curves, limit)) == pytest.approx(knapsack(curves, limit), abs=1e-9)


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


@pytest.mark.parametrize("energy", ["decaying", "flat"])
@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("keep", [0.2, 0.37, 0.5])
def test_identical_curves_get_equal_ranks_within_one_step(energy, multiple_of, keep):
    spectrum = np.ones(64) if energy == "flat" else np.arange(1, 65) ** -0.3
    # Only the ranks below break-even, so that dense (on the hull of slow decays) does not break the symmetry.
    whole = [spectrum_curve(f"s{i}", (64, 64), low_rank, spectrum) for i in range(6)]
    curves = [Curve(c.site, c.shape, c.ranks[:31], c.loss[:31] - c.loss[31], c.cost[:31], c.cost[31]) for c in whole]
    dense = sum(curve.dense_cost for curve in curves)
    ranks = lagrange(curves, int(keep * dense), multiple_of=multiple_of)
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
    assert total_loss([flat, steep], ranks) == pytest.approx(knapsack([flat, steep], limit))


def test_a_rank_deficient_site_is_not_stored_dense():
    curve = spectrum_curve("s", (16, 16), low_rank, [4, 3, 2, 1] + [0] * 12)
    assert lagrange([curve], 256) == {"s": 4}
    assert lagrange([curve], 10_000) == {"s": 4}


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
            assert lagrange([curve], limit) == {"s": expected}
            assert uniform([curve], limit) == {"s": expected}


@settings(max_examples=100, deadline=None)
@given(problem=problems(max_side=12), floor=st.sampled_from([0.25, 0.3, 0.5, 1.0]), multiple_of=st.integers(1, 3))
def test_floor_is_a_fraction_of_the_uniform_rank(problem, floor, multiple_of):
    curves, limit = problem
    even = uniform(curves, limit, multiple_of=multiple_of)
    ranks = lagrange(curves, limit, floor=floor, multiple_of=multiple_of)
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
    best = knapsack(curves, limit, multiple_of=4)
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
