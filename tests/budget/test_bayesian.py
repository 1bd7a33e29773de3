"""Bolaco's search: proposals are feasible, the best of them is kept, seeds repeat."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_curves import check_choices, low_rank, pivoted, problems, spectrum_curve, total_cost, total_loss

from corank.budget import uniform
from corank.budget.bayesian import bolaco, within
from corank.budget.options import options_of, worthwhile
from corank.budget.options import total_cost as cost_of
from corank.errors import CorankError


def model(count=low_rank, layers=3):
    decay = {"q": 2.0, "k": 2.0, "v": 0.2, "o": 0.5, "down": 0.1}
    return [
        spectrum_curve(f"{role}{i}", (24, 24), count, np.arange(1, 25.0) ** -d, role=role, layer=i)
        for role, d in decay.items()
        for i in range(layers)
    ]


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_every_proposal_meets_the_budget(problem, data):
    curves, limit = problem
    options = [options_of(c) for c in curves]
    if limit < sum(int(o.cost[0]) for o in options):
        return
    shares = np.array(data.draw(st.lists(st.floats(0.2, 1), min_size=len(curves), max_size=len(curves))))
    options = worthwhile(options)
    assert cost_of(options, within(options, shares, np.array([c.dense_cost for c in curves]), limit)) <= limit


@pytest.mark.parametrize("count", [low_rank, pivoted])
def test_equal_shares_are_the_uniform_choice_and_unequal_ones_are_in_proportion(count):
    curves = model(count)
    options = [options_of(c) for c in curves]
    limit = int(0.5 * sum(c.dense_cost for c in curves))
    dense = np.array([c.dense_cost for c in curves])
    even = within(options, np.full(len(curves), 0.7), dense, limit)
    ranks = uniform(curves, limit)
    for curve, option, at in zip(curves, options, even, strict=True):
        assert 0 <= option.rank[at] - ranks[curve.site] <= 1  # what whole ranks leave over goes to some
    shares = np.array([0.3 if c.role in "qk" else 0.6 for c in curves])
    chosen = within(options, shares, dense, limit)
    cost = {c.role: o.cost[at] for c, o, at in zip(curves, options, chosen, strict=True)}
    assert cost["v"] / cost["q"] == pytest.approx(2, abs=0.4)


def test_the_best_choice_tried_is_kept_and_the_seed_repeats_it():
    curves = model()
    limit = int(0.5 * sum(c.dense_cost for c in curves))
    tried = []

    def judge(ranks):
        check_choices(curves, ranks, limit)
        assert total_cost(curves, ranks) <= limit
        tried.append((total_loss(curves, ranks) ** 2, dict(ranks)))
        return tried[-1][0]

    found = bolaco(curves, limit, judge=judge, trials=12, seed=3)
    assert found == min(tried, key=lambda t: t[0])[1]
    assert tried[0][0] > total_loss(curves, found) ** 2
    assert found["q0"] < found["down0"]
    for role in ("q", "k", "v", "o", "down"):  # one share in all layers, up to what is left over
        ranks = [24 if found[f"{role}{i}"] is None else found[f"{role}{i}"] for i in range(3)]
        assert max(ranks) - min(ranks) <= 1 or 24 in ranks
    assert abs((found["q0"] or 0) - (found["k0"] or 0)) <= 1
    assert bolaco(curves, limit, judge=judge, trials=12, seed=3) == found


def test_without_a_choice_nothing_is_searched(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    one = [spectrum_curve(f"q{i}", (8, 8), low_rank, np.arange(8, 0, -1), role="q") for i in range(2)]
    assert bolaco(one, 64) == uniform(one, 64)
    with pytest.raises(CorankError, match=r"pip install 'corank\[train\]'"):
        bolaco(model(), 5000)
