"""Zero-sum truncation against the procedure of the paper, written out one component at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_curves import low_rank, pivoted, spectrum_curve, total_cost

from corank.budget import ALLOCATORS
from corank.budget.zero_sum import _ladder
from corank.errors import CorankError

zero_sum = ALLOCATORS["zs-svd"]


def signed(site, shape, count, changes):
    """A curve whose component i changes the loss by changes[i] if it is removed."""
    changes = np.asarray(changes, dtype=float)
    tail = np.append(np.cumsum(changes[::-1])[::-1], 0.0)
    curve = spectrum_curve(site, shape, count, np.arange(len(changes), 0, -1.0))
    return dataclasses.replace(curve, first_order=tail)


def by_hand(curves, changes, limit):
    """Ranks when the budget is first met, and the running sums as long as there is a choice of sign."""
    rank = {c.site: min(c.shape) for c in curves}
    of = dict(zip([c.site for c in curves], changes, strict=True))
    by_name = {c.site: c for c in curves}
    cost = lambda s: min(by_name[s].cost_at(rank[s]), by_name[s].dense_cost)  # noqa: E731
    drift, sums, choice = 0.0, [], True
    while sum(map(cost, rank)) > limit:
        offers = {s: of[s][rank[s] - 1] for s in rank if rank[s] > 0}
        wanted = [s for s, v in offers.items() if (v >= 0) == (drift <= 0)]
        choice = choice and bool(wanted)
        wanted = wanted or list(offers)
        site = min(wanted, key=lambda s: abs(offers[s]))
        drift += offers[site]
        rank[site] -= 1
        if choice:
            sums.append(drift)
    return {s: None if by_name[s].cost_at(r) >= by_name[s].dense_cost else r for s, r in rank.items()}, sums


@pytest.mark.parametrize("count", [low_rank, pivoted])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.95))
def test_the_procedure_of_the_paper(count, seed, share):
    rng = np.random.default_rng(seed)
    shapes = [(9, 9), (7, 12), (12, 6)]
    changes = [rng.normal(size=min(s)) * np.linspace(3, 0.2, min(s)) for s in shapes]
    curves = [signed(f"s{i}", s, count, c) for i, (s, c) in enumerate(zip(shapes, changes, strict=True))]
    limit = int(share * sum(c.dense_cost for c in curves))
    wanted, _ = by_hand(curves, changes, limit)
    found = zero_sum(curves, limit)
    left = limit - total_cost(curves, wanted)
    for curve in curves:  # the last removal may leave room, which is given back
        assert 0 <= curve.cost_at(found[curve.site]) - curve.cost_at(wanted[curve.site]) <= left
    assert total_cost(curves, found) <= limit


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_sum_stays_near_zero(seed):
    rng = np.random.default_rng(seed)
    changes = [rng.normal(size=16) for _ in range(8)]
    curves = [signed(f"s{i}", (16, 16), low_rank, c) for i, c in enumerate(changes)]
    _, sums = by_hand(curves, changes, 1500)
    largest = max(np.abs(c).max() for c in changes)
    assert max(map(abs, sums), default=0.0) <= largest + 1e-12


def test_removals_above_break_even_save_nothing_and_add_up():
    curve = signed("s", (10, 10), low_rank, np.arange(1.0, 11))
    from corank.budget.options import options_of

    steps = list(_ladder(curve, options_of(curve), 1))
    assert [s[0] for s in steps] == list(np.arange(10.0, 0, -1))  # component 10 first
    assert [s[1] for s in steps] == [0, 0, 0, 0, 0, 20, 20, 20, 20, 20]  # rank 5 costs what dense does
    assert [s[2] for s in steps] == [5, 5, 5, 5, 5, 4, 3, 2, 1, 0]
    twos = list(_ladder(curve, options_of(curve, 2), 2))
    assert [s[0] for s in twos] == [19, 15, 11, 7, 3] and [s[1] for s in twos] == [0, 0, 20, 40, 40]


def test_cancelling_sites_are_cut_before_one_that_only_hurts():
    plus = signed("plus", (8, 8), low_rank, np.full(8, 1.0))
    minus = signed("minus", (8, 8), low_rank, np.full(8, -1.0))
    hurts = signed("hurts", (8, 8), low_rank, np.full(8, 5.0))
    assert zero_sum([plus, minus, hurts], 64 + 32) == {"plus": 1, "minus": 1, "hurts": None}


def test_one_change_per_rank():
    curve = spectrum_curve("s", (4, 4), low_rank, [4, 3, 2, 1])
    with pytest.raises(CorankError, match="one first-order change per rank"):
        dataclasses.replace(curve, first_order=np.zeros(3))
