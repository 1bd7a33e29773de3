"""Shares and widths: the budget is met and never exceeded, shares lie in [0, cap], equals are treated alike."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from corank.errors import CorankError
from corank.model import outline
from corank.structured.allocation import Part, by_shares, counts_of, entropic, logarithmic, pooled, shares, size
from corank.structured.recipe import Structured
from corank.structured.shape import parameters, shape_of_block
from corank.structured.units import CHANNELS, HEADS, PAIRS, find_units
from corank.structured.widths import Blocks, head_dimensions, needs_scores, widths
from tiny import tiny


def test_shares_add_up_and_stay_below_the_cap():
    g = torch.Generator().manual_seed(0)
    for remove in (0.05, 0.3, 0.6, 0.79):
        s = torch.rand(12, generator=g).tolist()
        totals = (100 * torch.rand(12, generator=g) + 10).tolist()
        phi = shares(entropic(s, 0.3), totals, remove * sum(totals), [0.8] * 12)
        assert sum(f * t for f, t in zip(phi, totals, strict=True)) == pytest.approx(remove * sum(totals))
        assert all(0 <= f <= 0.8 for f in phi)
        order = sorted(range(12), key=s.__getitem__)
        assert all(phi[a] >= phi[b] - 1e-12 for a, b in zip(order, order[1:], strict=False))


def test_shares_are_the_optimum_of_their_problem():
    """sum s (1 - phi) + eps sum H(phi), in the interior: phi_l proportional to exp(-s_l / eps)."""
    s, eps = [0.1, 0.2, 0.4], 0.5 * (0.7 / 3)
    phi = shares(entropic(s, 0.5), [1.0] * 3, 0.3 * 3, [1.0] * 3)
    expected = torch.softmax(-torch.tensor(s, dtype=torch.float64) / eps, 0) * 0.9
    assert torch.allclose(torch.tensor(phi, dtype=torch.float64), expected)
    assert shares(entropic([0.4] * 5, 0.1), [2.0] * 5, 3.0, [0.9] * 5) == pytest.approx([0.3] * 5)
    assert shares(entropic([0.0] * 4, 0.1), [1.0] * 4, 1.0, [0.9] * 4) == pytest.approx([0.25] * 4)
    near = shares(entropic([0.1, 0.9], 1e6), [1.0, 1.0], 1.0, [1.0] * 2)
    assert near == pytest.approx([0.5, 0.5], abs=1e-5)


def test_the_logarithmic_schedule_is_that_of_its_paper():
    """From 6.25% to 25% over 32 blocks is 20% altogether."""
    weights = logarithmic(32)
    phi = shares(weights, [1.0] * 32, 0.2 * 32, [1.0] * 32)
    assert phi[0] == pytest.approx(0.0625, rel=0.02) and phi[-1] == pytest.approx(0.25, rel=0.02)
    assert all(a <= b for a, b in zip(phi, phi[1:], strict=False))
    assert logarithmic(1) == [1.0]


def test_counts_are_rounded_to_steps_and_the_rest_is_handed_out():
    parts = [Part(0, CHANNELS, 100, 10, step=8), Part(1, CHANNELS, 100, 10, step=8), Part(2, CHANNELS, 33, 10)]
    for limit in range(400, 2331, 170):
        phi = shares([1.0] * 3, [float(p.total) for p in parts], sum(p.total for p in parts) - limit, [1.0] * 3)
        counts = counts_of(parts, phi, limit)
        assert size(parts, counts) <= limit and counts[0] == counts[1]
        assert all(k % p.step == 0 or k == p.count for k, p in zip(counts, parts, strict=True))
    assert counts_of(parts, [0.0] * 3, 2330) == [100, 100, 33]
    with pytest.raises(CorankError, match="have to stay"):
        counts_of(parts, [1.0] * 3, 100)


def test_one_list_of_all_units_keeps_the_best():
    g = torch.Generator().manual_seed(1)
    parts = [Part(0, HEADS, 4, 30), Part(0, CHANNELS, 50, 2), Part(1, HEADS, 4, 30), Part(1, CHANNELS, 50, 2)]
    scores = [torch.randn(p.count, generator=g) for p in parts]
    limit = 250
    counts = pooled(parts, scores, limit)
    assert limit - 30 < size(parts, counts) <= limit
    kept = [s.sort(descending=True).values[:k] for s, k in zip(scores, counts, strict=True)]
    gone = [s.sort(descending=True).values[k:] for s, k in zip(scores, counts, strict=True)]
    channels = [i for i, p in enumerate(parts) if p.kind == CHANNELS]
    assert min(float(kept[i].min()) for i in channels) >= max(float(gone[i].max()) for i in channels)
    assert pooled(parts, scores, 1_000) == [4, 50, 4, 50]
    assert min(pooled(parts, [torch.zeros(4), torch.ones(50)] * 2, 70)) >= 1
    with pytest.raises(CorankError, match="have to stay"):
        pooled(parts, scores, 63)


def test_heads_are_rounded_up_and_channels_pay_for_it():
    parts = [Part(0, HEADS, 3, 100), Part(0, CHANNELS, 200, 4)]
    heads, channels = by_shares(parts, [1.0, 1.0], 880, 1.0)  # 80%: 2.4 heads are 3
    assert (heads, channels) == (3, 145)
    heads, channels = by_shares(parts, [1.0, 1.0], 660, 1.0)  # 60%: 1.8 heads are 2
    assert (heads, channels) == (2, 115)
    heads, channels = by_shares(parts, [1.0, 1.0], 990, 1.0)  # 90%: 2.7 heads are 3
    assert (heads, channels) == (3, 172)
    with pytest.raises(CorankError, match="cap=0.3"):
        by_shares(parts, [1.0, 1.0], 550, 0.3)


def blocks_of(name: str, protected: tuple[int, ...] = ()) -> Blocks:
    model = tiny(name)
    plan = outline(model.config, type(model))
    sites = [plan.in_layer(i) for i in range(plan.layers)]
    shapes = [shape_of_block(model.config, s) for s in sites]
    paths = [plan.path(i) for i in range(plan.layers)]
    units = [find_units(model.get_submodule(p), s, f"{p}.", model.config)[0] for p, s in zip(paths, sites, strict=True)]
    return Blocks(shapes, sites, units, protected)


def scores_of(blocks: Blocks, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [{u.kind: torch.rand(u.count, generator=g, dtype=torch.float64) for u in units} for units in blocks.units]


INFLUENCE = [0.5, 0.1, 0.3]


def ask(recipe: Structured, blocks: Blocks, keep: float):
    limit = int(keep * blocks.dense)
    scores = scores_of(blocks) if needs_scores(recipe, blocks, limit) else None
    after = widths(recipe, blocks, limit, influence=INFLUENCE, scores=scores)
    assert blocks.size(after) <= limit
    return after, limit


@pytest.mark.parametrize("allocate", ["uniform", "entropic", "z-score", "log"])
@pytest.mark.parametrize("units", [("channels",), ("channels", "heads"), ("channels", "qk", "vo")])
@pytest.mark.parametrize("compensate", ["ls", "affine-ls"])
def test_budgets_are_met_and_never_exceeded(allocate, units, compensate):
    for name in ("llama-gqa", "qwen2-bias", "gpt2-conv1d"):
        blocks = blocks_of(name)
        recipe = Structured(units=units, score="wifv", compensate=compensate, allocate=allocate, temperature=0.5)
        assert ask(recipe, blocks, 1.0)[0] == list(blocks.shapes)
        for keep in (0.95, 0.8, 0.6):
            after, limit = ask(recipe, blocks, keep)
            coarse = max(recipe.multiple_of, 1) * 3 * 24 * 4
            assert limit - blocks.size(after) < coarse, (name, keep)
            assert all(a.heads * b.kv_heads == a.kv_heads * b.heads for a, b in zip(after, blocks.shapes, strict=True))
            assert min(min(a.channels, a.kv_heads, a.head_dim) for a in after) >= 1


def test_biases_come_only_where_something_goes():
    recipe = Structured(units=("channels",), score="greedy", compensate="affine-ls", protect=("1",))
    blocks = blocks_of("llama-gqa", protected=(1,))
    after, _ = ask(recipe, blocks, 0.8)
    assert [a.biases for a in after] == [("mlp.down_proj",), (), ("mlp.down_proj",)]
    assert after[1] == blocks.shapes[1]
    after, _ = ask(recipe, blocks_of("gpt2-conv1d"), 0.8)
    assert all(not a.biases for a in after)  # there are biases already


def test_uniform_gives_all_blocks_the_same_widths():
    for units in (("channels",), ("channels", "heads"), ("channels", "qk", "vo")):
        recipe = Structured(units=units, score="wifv", allocate="entropic", uniform=True, multiple_of=4)
        assert recipe.allocate == "uniform"
        for keep in (0.9, 0.5):
            after, _ = ask(recipe, blocks_of("llama-gqa"), keep)
            assert len(set(after)) == 1 and after[0].channels % 4 == 0
    with pytest.raises(CorankError, match="uniform"):
        Structured(units=("channels",), score="wifv", uniform=True, protect=("ends",))
    blocks = blocks_of("llama-gqa")
    short = dataclasses.replace(blocks, units=[[], *blocks.units[1:]])
    with pytest.raises(CorankError, match="all 3 blocks"):
        ask(Structured(units=("channels",), score="wifv", uniform=True), short, 0.8)


def test_attention_keeps_its_size_while_channels_suffice():
    recipe = Structured(units=("channels", "qk", "vo"), score="leverage", compensate="ls")
    blocks = blocks_of("llama-gqa")
    channels = 3 * 24 * 37 * 3
    enough, less = blocks.dense - channels // 2, blocks.dense - channels * 6 // 10
    assert head_dimensions(recipe, blocks, enough) is None and not needs_scores(recipe, blocks, enough)
    assert head_dimensions(recipe, blocks, less) == 4 and needs_scores(recipe, blocks, less)
    scores = [{PAIRS: torch.tensor([1.0, 9.0, 3.0])}, {PAIRS: torch.tensor([5.0, 1.0, 6.0])}] * 2
    after = widths(recipe, blocks, less, scores=scores[:3])
    assert {(a.head_dim, a.pairs) for a in after} == {(4, (1, 2))}
    alone = dataclasses.replace(recipe, units=("channels",))
    assert head_dimensions(alone, blocks, less) is None
    assert head_dimensions(recipe, dataclasses.replace(blocks, protected=(0,)), less) is None
    assert head_dimensions(dataclasses.replace(recipe, sequential=True), blocks, less) is None


def test_parts_cost_what_their_removal_frees():
    blocks = blocks_of("llama-gqa")
    recipe = Structured(units=("channels", "heads"), score="wifv")
    for kind in (CHANNELS, HEADS):
        part = blocks.part(recipe, 0, kind)
        assert part.cost == {CHANNELS: 3 * 24, HEADS: (2 * 2 + 2) * 6 * 24}[kind]
        assert part.total <= parameters(blocks.sites[0], blocks.shapes[0], blocks.shapes[0])


def test_what_cannot_be_narrowed_and_what_would_be_empty():
    blocks = blocks_of("llama-gqa")
    with pytest.raises(CorankError, match="shortgpt"):
        ask(Structured(units=("heads",), score="wifv"), blocks_of("gpt2-conv1d"), 0.8)
    for allocate in ("uniform", "z-score"):
        with pytest.raises(CorankError, match="have to stay|can be narrowed"):
            ask(Structured(units=("channels",), score="wifv", allocate=allocate), blocks, 0.2)
