"""Allocators whose currency is measured on the model: LEMS, ASVD's search, Bolaco."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from jobs import DATA, TEXT, job_for, measured

import corank
from corank.budget import ALLOCATORS, Curve
from corank.budget.threshold import strs
from corank.engine.passes import prepare
from corank.errors import CorankError
from corank.probing import lems, look, sensitivity
from corank.probing.probe import Prober
from tiny import tiny, tokenizer


def curve(loss, cost=2, dense=40, site="s"):
    ranks = np.arange(len(loss))
    return Curve(site, (20, 20), ranks, np.asarray(loss, dtype=float), cost * ranks, dense)


def power_law(c, p, dense=40):
    energy = np.geomspace(8.0, 0.5, 16)
    share = np.append(np.cumsum(energy[::-1])[::-1], 0.0) / energy.sum()
    return curve(share * 3, dense=dense), c * share**p


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0, 1.7, 2.0])
def test_two_points_of_a_power_law_give_it_back(p):
    given, truth = power_law(0.37, p)
    ranks = lems.probe_ranks(given)
    assert ranks == [2, 10]  # 10% and 60% of 16, rounded up
    found = lems.through(given, ranks, [truth[r] for r in ranks])
    np.testing.assert_allclose(found.loss, truth, rtol=1e-12)


@pytest.mark.parametrize(("p", "clipped"), [(0.1, 0.5), (5.0, 2.0)])
def test_exponents_are_bounded(p, clipped):
    given, truth = power_law(2.0, p)
    ranks = lems.probe_ranks(given)
    found = lems.through(given, ranks, [truth[r] for r in ranks]).loss
    share = given.loss / given.loss[0]
    np.testing.assert_allclose(found / found[3], (share / share[3]) ** clipped, rtol=1e-12)
    excess = [found[r] / truth[r] for r in ranks]
    assert excess[0] * excess[1] == pytest.approx(1.0)  # off by the same factor at both points


def test_curves_without_a_choice_are_left_alone():
    nothing = curve([0.0] * 9)
    assert lems.probe_ranks(nothing) == [] and not lems.through(nothing, [], []).loss.any()
    dense_only = Curve("t", (1, 3), np.array([1]), np.array([2.0]), np.array([4]), 3)
    assert lems.probe_ranks(dense_only) == []
    assert lems.probe_ranks(curve([1.0, 0.5], dense=3)) == [1]
    silent = lems.through(curve([2.0, 1.0, 0.0]), [1, 2], [0.0, 0.0])
    assert not silent.loss.any()  # whatever the energy: nothing happens to the predictions


def silenced(name="llama-gqa"):
    """A model in which the values of the second layer go nowhere, and so do its queries and keys."""
    model = tiny(name)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    return model


@pytest.mark.parametrize("method", ["svd-llm", "col-id", "svd"])
def test_lems_gives_the_lowest_rank_to_what_does_not_matter(method, tmp_path):
    model = silenced()
    report = corank.compress(model, method, keep=0.6, allocate="lems", tokenizer=tokenizer(), data=TEXT, **DATA)
    ranks = {row["name"]: row["rank"] for row in report.sites}
    for site in ("q", "k", "v", "o"):
        assert ranks[f"model.layers.1.self_attn.{site}_proj"] == 0
    even = corank.compress(silenced(), method, keep=0.6, allocate="lagrange", tokenizer=tokenizer(), data=TEXT, **DATA)
    assert any(row["rank"] > 0 for row in even.sites if "layers.1.self_attn" in row["name"])  # its energy did not tell
    assert sum(ranks.values()) > 4


def test_lems_is_the_hull_on_its_own_measurements(tmp_path):
    model = tiny("llama-gqa", dtype=torch.float64)
    job = job_for(model, tmp_path, allocate="lems", pack=True)
    store, curves = measured(job)
    found = look.look(job, store, curves, job.limit)
    prober = Prober(job, store)
    for given, new in zip(curves, found.curves, strict=True):
        ranks = lems.probe_ranks(given)
        effects = prober.effects([{given.site: r} for r in ranks])
        power = np.log(effects[0].kl / effects[1].kl) / np.log(given.loss_at(ranks[0]) / given.loss_at(ranks[1]))
        if 0.5 < power < 2:  # not clipped: through both points
            assert [new.loss_at(r) for r in ranks] == pytest.approx([e.kl for e in effects], rel=1e-9)
    assert prober.probes == 0
    plan = prepare(job).plan
    wanted = ALLOCATORS["lagrange"](found.curves, job.limit)
    assert {n: None if c.is_dense else c.rank for n, c in plan.choices.items()} == wanted
    other = ALLOCATORS["lagrange"](curves, job.limit)
    assert wanted != other


def test_a_second_ratio_costs_no_probe(tmp_path, monkeypatch):
    walks = []
    walk = Prober._walk
    monkeypatch.setattr(
        Prober, "_walk", lambda self, keys, changes: (walks.append(len(keys)), walk(self, keys, changes))
    )
    settings = dict(allocate="lems", tokenizer=tokenizer(), data=TEXT, cache=tmp_path / "cache", **DATA)
    corank.compress(tiny("llama-gqa"), "svd-llm", keep=0.8, **settings)
    assert walks == [42]
    report = corank.compress(tiny("llama-gqa"), "svd-llm", keep=0.5, **settings)
    assert walks == [42]
    assert report.accounting["sites"]["compressed"] <= 0.5 * report.accounting["sites"]["dense"]


def test_asvd_search_measures_the_grid_and_finds_the_threshold(tmp_path):
    model = tiny("qwen2-bias", dtype=torch.float64)
    job = job_for(model, tmp_path, "asvd", keep=0.75, allocate="asvd-search")
    store, curves = measured(job)
    found = look.look(job, store, curves, job.limit).curves
    prober = Prober(job, store)
    for given, new in zip(curves, found, strict=True):
        shares = given.cost / given.dense_cost
        grid = sorted({int(np.flatnonzero(shares <= r + 1e-12)[-1]) for r in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)})
        assert new.ranks.tolist() == list(range(grid[0], min(given.shape) + 1))
        rises = [prober.effects([{new.site: r}])[0].rise for r in grid]
        assert [new.loss_at(r) for r in grid] == pytest.approx(rises, rel=1e-12) and new.loss_at(None) == 0
        for low, high, left, right in zip(grid, grid[1:], rises, rises[1:], strict=False):  # a line between neighbours
            for r in range(low, high):
                assert new.loss_at(r) == pytest.approx(left + (right - left) * (r - low) / (high - low), abs=1e-12)
    assert prober.probes == 0

    # the paper's own way: sort all measurements, bisect the threshold, each its smallest size below it
    def stored(level):
        fits = [[int(k) for k, v in zip(c.cost, c.loss, strict=True) if v <= level] + [c.dense_cost] for c in found]
        return [min(sizes) for sizes in fits]

    levels = {float(v) for c in found for v in c.loss if v >= 0}  # below zero even dense is above the threshold
    level = min(v for v in levels if sum(stored(v)) <= job.limit)
    ranks = strs(found, job.limit)
    cost = [c.cost_at(ranks[c.site]) for c in found]
    assert all(mine >= theirs for mine, theirs in zip(cost, stored(level), strict=True))
    assert sum(stored(level)) <= sum(cost) <= job.limit


def test_the_grid_goes_lower_where_the_budget_does():
    class Silent:
        def effects(self, changes):
            self.asked = changes
            return [dataclasses.make_dataclass("E", ["rise"])(1.0 / (1 + next(iter(c.values())))) for c in changes]

    silent, given = Silent(), [curve(np.arange(20.0, -1, -1), site=f"s{i}") for i in range(2)]
    high = sensitivity.measured(silent, given, 60)
    assert [c["s1"] for c in silent.asked[6:]] == [8, 10, 12, 14, 16, 18] and high[0].ranks.tolist() == list(
        range(8, 21)
    )
    low = sensitivity.measured(silent, given, 30, multiple_of=4)
    assert [c["s1"] for c in silent.asked[5:]] == [0, 4, 8, 12, 16] and low[0].ranks[0] == 0


def test_bolaco_keeps_the_best_choice_it_measured(tmp_path, monkeypatch):
    model = tiny("llama-gqa")
    job = job_for(model, tmp_path, "bolaco", keep=0.7, trials=14)
    store, curves = measured(job)
    found = look.look(job, store, curves, job.limit)
    tried = []

    def judge(ranks):
        tried.append((found.options["judge"](ranks), dict(ranks)))
        return tried[-1][0]

    options = {**found.options, "judge": judge}
    ranks = ALLOCATORS["bolaco"](found.curves, job.limit, **options)
    assert ranks == min(tried, key=lambda t: t[0])[1]
    assert 3 <= len(tried) <= 15 and tried[0][0] > min(t[0] for t in tried)  # better than the uniform choice
    again = Prober(job, store)
    options["judge"] = lambda ranks: again.effects([{s: r for s, r in ranks.items() if r is not None}])[0].kl
    assert ALLOCATORS["bolaco"](found.curves, job.limit, **options) == ranks  # the same seed
    assert again.probes == 0  # and every trial was in the store


def test_only_what_looks_at_the_model_needs_text_more_than_its_method():
    with pytest.raises(CorankError, match="probe_windows, trials and steps"):
        corank.compress(tiny("llama-gqa"), "svd", keep=0.7, allocate="lems", probe_windows=0)
    with pytest.raises(CorankError, match="Give tokenizer"):
        corank.compress(tiny("llama-gqa"), "svd", keep=0.7, allocate="lems", data=TEXT)
    corank.compress(tiny("llama-gqa"), "svd", keep=0.7, allocate="lagrange")  # knows no data
