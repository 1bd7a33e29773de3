"""Compress to a perplexity: the search meets the limit with almost the smallest size, and says so if it cannot."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corank
from corank.model import Text
from corank.quality import MOST, TOLERANCE, compress_to_quality, parse_increase, search
from tiny import saved, text

TEXT, OTHER = Text(text(), "words"), Text(text(seed=5), "other words")


@settings(max_examples=60, deadline=None)
@given(rate=st.floats(2.5, 30), at=st.floats(0.001, 2.0), limit=st.floats(0.01, 1.0))
def test_the_search_meets_the_limit_with_almost_the_smallest_size(rate, at, limit):
    """Increase(keep) = at * exp(-rate (keep - 0.8)): the exact answer is known."""
    exact = 0.8 - math.log(limit / at) / rate
    best, tried = search(lambda keep: at * math.exp(-rate * (keep - 0.8)), limit)
    assert len(tried) <= MOST
    if exact > 0.98:
        assert best is None or best.increase <= limit
        return
    assert best is not None and best.increase <= limit
    assert best.keep - max(exact, 0.05) <= 2 * TOLERANCE


def test_noise_cannot_make_it_break_the_limit():
    best, tried = search(lambda keep: 0.1 * math.exp(-9 * (keep - 0.8)) * (1.3 if int(keep * 1e4) % 2 else 0.8), 0.08)
    assert best is not None and best.increase <= 0.08 and best in tried


def test_collapsed_models_are_survived():
    best, _ = search(lambda keep: math.inf if keep < 0.9 else 0.01, 0.05)
    assert best is not None and best.keep - 0.9 <= 2 * TOLERANCE


def test_no_size_is_good_enough():
    best, tried = search(lambda keep: 5.0, 0.01)
    assert best is None and tried[-1].keep > 0.97


@pytest.mark.parametrize("value", ["x", "-5%", 0, "0%", float("inf")])
def test_meaningless_targets(value):
    with pytest.raises(corank.CorankError, match="positive share"):
        parse_increase(value)


def test_a_model_is_compressed_to_a_perplexity(tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    told = []
    common = dict(data=TEXT, samples=6, length=16, batch=4)
    # the limits of a random model's perplexity are narrow
    report = compress_to_quality(
        folder, "best", "0.5%", out=tmp_path / "small", heldout=OTHER, windows=4, window=16, told=told.append, **common
    )
    model, tokenizer = corank.load(tmp_path / "small")
    dense = corank.evaluate(*corank.load(folder), OTHER, max_windows=4, window=16)
    found = corank.evaluate(model, tokenizer, OTHER, max_windows=4, window=16)
    assert found.value <= dense.value * 1.005
    assert report.budget["trials"] == [
        {"keep": t.keep, "increase": pytest.approx(math.expm1(t.increase))} for t in told
    ]
    assert not (tmp_path / "small.search").exists()


def test_what_cannot_be_met_writes_nothing(tmp_path, monkeypatch):
    folder = saved("llama-gqa", tmp_path / "dense")
    monkeypatch.setattr("corank.quality.search", lambda trial, limit: (None, [corank.quality.Trial(0.99, 0.7)]))
    with pytest.raises(corank.CorankError, match=r"keep=0.990, is 101.4% above"):
        corank.compress(
            folder, max_perplexity_increase="1%", out=tmp_path / "small", data=TEXT, heldout=OTHER, length=16
        )
    assert not (tmp_path / "small").exists() and not (tmp_path / "small.search").exists()


def test_a_size_and_a_quality_are_not_both_possible(tmp_path):
    with pytest.raises(corank.CorankError, match="not both"):
        corank.compress("anything", keep=0.5, max_perplexity_increase="5%", out=tmp_path / "x")
