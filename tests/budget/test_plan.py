"""Plans: assembled, saved, edited, refused. Curves: built and refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from corank.budget import ALLOCATORS, Choice, Curve, Plan, make_plan
from corank.errors import CorankError


def count(m, n, k):
    return k * (m + n)


def curve(site="a", shape=(8, 6), loss=None):
    return Curve.from_count(site, shape, count, [21, 15, 10, 6, 3, 1, 0] if loss is None else loss)


CURVES = [curve("a"), curve("b"), curve("c", (6, 6), np.full(7, 100.0) * (np.arange(7) < 6))]


def plan(**options):
    return make_plan(CURVES, 80, **options)


def test_plan_adds_up():
    made = Plan.from_ranks(CURVES, {"a": 2, "b": 0, "c": None}, kind="low_rank", allocator="by hand", limit=70)
    assert made.choices == {"a": Choice("low_rank", 2), "b": Choice("low_rank", 0), "c": Choice("dense", 6)}
    assert made.cost == 2 * 14 + 0 + 36
    assert made.predicted_loss == 10 + 21 + 0
    assert [choice.is_dense for choice in made.choices.values()] == [False, False, True]


def test_make_plan_records_what_was_asked():
    made = plan()
    assert made.allocator == "lagrange" and made.limit == 80 and made.cost <= 80
    assert made.choices["c"].is_dense  # 100 lost at any rank below full
    assert plan(kind={"a": "row_pivoted", "b": "low_rank", "c": "cur"}).choices["a"].kind == "row_pivoted"
    with pytest.raises(CorankError, match="nearest: uniform"):
        plan(allocator="unifrom")


def test_unknown_losses_give_no_prediction_and_valid_json():
    made = make_plan([Curve.from_count("a", (8, 6), count)], 30, allocator="uniform")
    assert made.choices["a"].rank == 2
    assert made.predicted_loss is None
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
def test_json_round_trip(allocator):
    made = plan(allocator=allocator)
    assert Plan.from_json(made.to_json()) == made
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": 3}', "null"])
def test_what_is_not_a_plan_is_refused(text):
    with pytest.raises(CorankError, match="Plan.to_json"):
        Plan.from_json(text)


@pytest.mark.parametrize("choice", [{"kind": "low_rank"}, {"kind": "low_rank", "rank": "x"}, {"kind": "d", "rank": -1}])
def test_malformed_choices_are_refused(choice):
    data = plan().to_dict()
    data["choices"]["a"] = choice
    with pytest.raises(CorankError):
        Plan.from_dict(data)


def test_edited_ranks_are_checked():
    ranks = {"a": 2, "b": 2, "c": None}
    with pytest.raises(CorankError, match="cost 92"):
        Plan.from_ranks(CURVES, ranks, kind="low_rank", allocator="edited", limit=91)
    with pytest.raises(CorankError, match="Rank 7 is not on the curve of 'a'"):
        Plan.from_ranks(CURVES, {**ranks, "a": 7}, kind="low_rank", allocator="edited", limit=999)
    with pytest.raises(CorankError, match="'d'"):
        Plan.from_ranks(CURVES, {**ranks, "d": 1}, kind="low_rank", allocator="edited", limit=999)
    with pytest.raises(CorankError, match="'b'"):
        Plan.from_ranks(CURVES, ranks, kind={"a": "cur", "c": "cur"}, allocator="edited", limit=999)


def test_summary_names_sizes_and_ranks():
    text = plan().summary()
    assert "lagrange" in text and "80" in text and "dense: 1 sites" in text
    assert f"{plan().cost:,} of 80" in text


def test_curve_of_a_group_has_its_own_dense_cost():
    group = Curve("qkv", (18, 6), np.arange(7), np.arange(7)[::-1], count(18, 6, np.arange(7)), 108)
    assert group.cost_at(None) == 108 and group.loss_at(None) == 0
    assert group.cost_at(3) == 72 and group.loss_at(3) == 3


def test_curves_know_where_their_site_stands():
    plain = curve("a")
    assert (plain.role, plain.layer, plain.importance) == ("", 0, 1.0)
    placed = Curve.from_count("a", (8, 6), count, role="up", layer=3, importance=0.25)
    for one in (placed, placed.weighted(2.0)):
        assert (one.role, one.layer, one.importance) == ("up", 3, 0.25)
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(CorankError, match="importance of 'a'"):
            Curve.from_count("a", (8, 6), count, importance=bad)


def test_thinned_ranks():
    thin = Curve.from_count("a", (8, 6), count, [9, 4, 0], ranks=[0, 2, 6])
    assert thin.cost.tolist() == [0, 28, 84]
    with pytest.raises(CorankError, match="Rank 1"):
        thin.cost_at(1)


@pytest.mark.parametrize(
    "fields",
    [
        {"ranks": [0, 2, 1]},
        {"ranks": [0, 1, 1]},
        {"ranks": [0, 1, 7]},
        {"ranks": [-1, 0, 1]},
        {"cost": [0, 10, 9]},
        {"loss": [1.0, 0.0]},
        {"dense_cost": 0},
    ],
)
def test_bad_curves_are_refused(fields):
    good = {
        "site": "layer.3.q",
        "shape": (8, 6),
        "ranks": [0, 1, 2],
        "loss": [2.0, 1.0, 0.0],
        "cost": [0, 14, 28],
        "dense_cost": 48,
    }
    Curve(**good)
    with pytest.raises(CorankError, match="layer.3.q"):
        Curve(**{**good, **fields})
