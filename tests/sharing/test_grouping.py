"""Which groups share: compared at equal cost, at the price of the budget, and never to the harm of the whole."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from corank.budget import ALLOCATORS, Curve, Plan
from corank.budget.grouping import choose_groups, with_groups
from corank.factors import count_shared

N = 8


def curve(site, m, energy, members=None):
    """The curve of singular values whose squares are `energy`."""
    p = min(m, N)
    energy = np.sort(np.asarray(energy, dtype=float))[::-1][:p]
    energy = np.concatenate([energy, np.zeros(p - len(energy))])
    loss = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    ms = [s[0] for s in members.values()] if members else [m]
    cost = [count_shared(ms, N, k) for k in range(p + 1)]
    return Curve(site, (m, N), np.arange(p + 1), loss, cost, m * N, members=members or {})


def sites(count=4, m=6, seed=0):
    g = np.random.default_rng(seed)
    return [curve(f"s{i}", m, g.exponential(size=6) * 0.5 ** np.arange(6)) for i in range(count)]


def group(curves, names, factor):
    """A group whose energies are those of its members pooled two by two: `factor` 1 shares for nothing."""
    members = {n: next(c.shape for c in curves if c.site == n) for n in names}
    pooled = sum(-np.diff(next(c for c in curves if c.site == n).loss) for n in names)
    return curve(names[0], sum(s[0] for s in members.values()), pooled * factor, members)


def allocate(name="lagrange", limit=100):
    return lambda curves: ALLOCATORS[name](curves, limit, floor=0.0, multiple_of=1)


def loss_of(curves, ranks):
    return math.fsum(c.loss_at(ranks[c.site]) for c in curves)


def test_what_is_free_is_shared_and_what_is_dear_is_not():
    private = [curve(f"s{i}", 6, 0.5 ** np.arange(6)) for i in range(4)]
    free, dear = group(private, ["s0", "s1"], 1.0), group(private, ["s2", "s3"], 3.0)
    curves, ranks = choose_groups(private, [[free, dear]], 100, allocate())
    assert [c.site for c in curves] == ["s0", "s2", "s3"] and curves[0] is free
    assert loss_of(curves, ranks) < loss_of(private, allocate()(private))
    assert sum(c.cost_at(ranks[c.site]) for c in curves) <= 100


@pytest.mark.parametrize("name", ["lagrange", "uniform", "knapsack", "d-rank"])
@pytest.mark.parametrize("seed", range(6))
def test_sharing_where_it_pays_is_never_worse_than_sharing_nothing_and_stays_within_the_limit(name, seed):
    g = np.random.default_rng(seed)
    private = sites(6, seed=seed)
    families = [
        [
            group(private, ["s0", "s1", "s2"], g.uniform(0.5, 1.6)),
            group(private, ["s3", "s4", "s5"], g.uniform(0.5, 1.6)),
        ],
        [group(private, [f"s{i}", f"s{i + 3}"], g.uniform(0.5, 1.6)) for i in range(3)],
    ]
    for limit in (60, 100, 160, 250):
        curves, ranks = choose_groups(private, families, limit, allocate(name, limit))
        assert sum(c.cost_at(ranks[c.site]) for c in curves) <= limit
        assert loss_of(curves, ranks) <= loss_of(private, allocate(name, limit)(private)) + 1e-12
        named = sorted(n for c in curves for n in (c.members or [c.site]))
        assert named == [f"s{i}" for i in range(6)]  # each site once


@pytest.mark.parametrize("seed", range(8))
def test_no_other_set_of_groups_is_better_by_more_than_a_step(seed):
    """Against all sets of groups of one family per site, allocated exactly."""
    g = np.random.default_rng(100 + seed)
    private = sites(4, seed=seed)
    families = [
        [group(private, ["s0", "s1"], g.uniform(0.6, 1.5)), group(private, ["s2", "s3"], g.uniform(0.6, 1.5))],
        [group(private, ["s0", "s2"], g.uniform(0.6, 1.5)), group(private, ["s1", "s3"], g.uniform(0.6, 1.5))],
    ]
    limit = 110
    exact = allocate("knapsack", limit)
    best = math.inf
    for family in families:
        for size in range(3):
            for chosen in itertools.combinations(family, size):
                curves = with_groups(private, list(chosen))
                best = min(best, loss_of(curves, exact(curves)))
    curves, ranks = choose_groups(private, families, limit, exact)
    step = max(float(-np.diff(c.loss).min()) for c in private)
    assert best - 1e-12 <= loss_of(curves, ranks) <= best + step


def test_a_plan_says_who_reads_which_basis():
    private = sites(3)
    shared = group(private, ["s0", "s2"], 1.0)
    curves = with_groups(private, [shared])
    assert [c.site for c in curves] == ["s0", "s1"]
    plan = Plan.from_ranks(curves, {"s0": 2, "s1": None}, kind="row_pivoted", allocator="lagrange", limit=1000)
    assert {n: (c.kind, c.rank, c.basis) for n, c in plan.choices.items()} == {
        "s0": ("low_rank", 2, "s0"),
        "s2": ("shared", 2, "s0"),
        "s1": ("dense", 6, None),
    }
    assert plan.cost == 2 * (N + 6 + 6) + 6 * N
    assert Plan.from_json(plan.to_json()) == plan
    dense = Plan.from_ranks(curves, {"s0": None, "s1": 1}, kind="row_pivoted", allocator="lagrange", limit=1000)
    assert dense.choices["s2"].is_dense and dense.choices["s2"].rank == 6 and dense.choices["s1"].kind == "row_pivoted"
