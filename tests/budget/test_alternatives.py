"""Storing some sites together or each on its own: what is chosen against every other choice."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from corank.budget import ALLOCATORS, Curve
from corank.budget.alternatives import Alternative, choose_alternatives, in_place
from corank.errors import CorankError


def curve(name, seed, p=8, height=1.0):
    rng = np.random.default_rng(seed)
    falls = np.sort(rng.random(p) ** 3)[::-1] * height
    return Curve(
        name,
        (p, p),
        np.arange(p + 1),
        np.maximum(falls.sum() - np.append(0.0, falls.cumsum()), 0.0),
        np.arange(p + 1) * 2 * p - np.arange(p + 1) ** 2,
        p * p,
    )


def case(seed):
    """Six sites in three sets of two, each with a width and with two widths whose matrices have curves too."""
    private = [curve(f"s{i}", 10 * seed + i) for i in range(6)]
    rng = np.random.default_rng(seed)
    sets = []
    for i in range(3):
        names = (f"s{2 * i}", f"s{2 * i + 1}")
        lost = np.sort(rng.random(7) * 3)[::-1]
        width = Curve(f"w{i}", (8, 8), np.arange(1, 8), lost, np.arange(1, 8) * 16, 128)
        ways = [Alternative(names, (width,))]
        for k in (3, 6):
            parts = tuple(curve(name, 100 + seed + k, k, 0.7) for name in names)
            ways.append(Alternative(names, parts, float(lost[k - 1]), k))
        sets.append(ways)
    return private, sets


def lagrange(limit):
    return lambda curves: ALLOCATORS["lagrange"](curves, limit)


def loss_of(curves, ranks, taken):
    return math.fsum([*(c.loss_at(ranks[c.site]) for c in curves), *(a.loss for a in taken)])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [90, 170, 260, 340])
def test_nothing_beats_the_choice_by_more_than_a_step_and_it_never_loses_more_than_leaving_all_alone(seed, limit):
    private, sets = case(seed)
    chosen = choose_alternatives(private, sets, limit, lagrange(limit))
    cost = sum(c.cost_at(chosen.ranks[c.site]) for c in chosen.curves)
    assert cost <= limit
    assert chosen.loss == pytest.approx(loss_of(chosen.curves, chosen.ranks, chosen.taken))
    every = []
    for picks in itertools.product(range(-1, 3), repeat=3):
        taken = [ways[i] for i, ways in zip(picks, sets, strict=True) if i >= 0]
        curves = in_place(private, taken)
        exact = ALLOCATORS["knapsack"](curves, limit)
        every.append(loss_of(curves, exact, taken))
    alone = loss_of(private, lagrange(limit)(private), ())
    assert chosen.loss <= alone
    step = max(float(np.max(-np.diff(c.loss))) for c in (*private, *(c for w in sets for a in w for c in a.curves)))
    assert min(every) - 1e-9 <= chosen.loss <= min(every) + step


def test_an_alternative_that_is_free_is_used_and_one_that_costs_more_is_not():
    private = [curve(f"s{i}", i) for i in range(4)]
    free = Alternative(("s0", "s1"), tuple(curve(n, i, 4, 0.0) for i, n in enumerate(("s0", "s1"))), 0.0, 4)
    bad = Alternative(("s2", "s3"), tuple(curve(n, i, 4, 0.0) for i, n in enumerate(("s2", "s3"))), 50.0, 4)
    chosen = choose_alternatives(private, [[free], [bad]], 150, lagrange(150))
    assert chosen.taken == (free,)
    assert [c.site for c in chosen.curves] == ["s0", "s1", "s2", "s3"]


def test_with_room_for_everything_nothing_is_changed():
    private, sets = case(0)
    chosen = choose_alternatives(private, sets, 6 * 64, lagrange(6 * 64))
    assert chosen.loss == 0 and set(chosen.ranks.values()) == {None}


def test_where_sites_alone_cannot_fit_the_widths_are_used_and_a_limit_below_them_is_refused():
    private, sets = case(1)
    none = np.empty(0)
    private = [Curve(c.site, c.shape, none, none, none, c.dense_cost) for c in private]
    sets = [ways[:1] for ways in sets]
    chosen = choose_alternatives(private, sets, 200, lagrange(200))
    assert sum(c.cost_at(chosen.ranks[c.site]) for c in chosen.curves) <= 200
    widths = in_place(private, [ways[0] for ways in sets])
    exact = loss_of(widths, ALLOCATORS["knapsack"](widths, 200), ())
    assert exact - 1e-12 <= chosen.loss <= loss_of(widths, lagrange(200)(widths), ())
    with pytest.raises(CorankError, match="smallest possible size is 48"):
        choose_alternatives(private, sets, 40, lagrange(40))
