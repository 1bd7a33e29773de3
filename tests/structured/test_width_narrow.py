"""Narrowing a block: planted units go without a trace, and losses are those that were predicted."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from width_blocks import block_of, llama, narrower, out

from corank.errors import CorankError
from corank.model import ResidentModel
from corank.recipe import methods
from corank.structured.moments import moments
from corank.structured.narrow import narrow, scores
from corank.structured.recipe import LEARNED, SCORES, Structured
from corank.structured.scores import SCORES as FUNCTIONS
from corank.structured.units import CHANNELS, HEADS, PAIRS, find_units
from tiny import MODELS, tiny, windows

DEAD, COPY, CONSTANT = 5, (3, 9), 20
RECIPES = {m.name: m.recipe() for m in methods(family="structured") if m.recipe().units}


def units_of(model):
    plan = ResidentModel(model).outline
    path = plan.path(0)
    return find_units(model.get_submodule(path), plan.in_layer(0), f"{path}.", model.config)


@pytest.mark.parametrize(
    "name, channels, kinds",
    [
        ("llama-gqa", 37, {HEADS: 2, PAIRS: 3}),
        ("qwen2-bias", 37, {HEADS: 2, PAIRS: 3}),
        ("gemma", 37, {HEADS: 1, PAIRS: 4}),
        ("phi3-fused", 37, {}),
        ("gpt2-conv1d", 96, {}),
        ("opt", 37, {}),
        ("bert", 37, {}),
    ],
)
def test_units_are_found_by_structure(name, channels, kinds):
    found, skipped = units_of(tiny(name))
    assert {u.kind: u.count for u in found} == {CHANNELS: channels, **kinds}
    assert {s.kind for s in skipped} == (set() if kinds else {HEADS})
    assert all(s.reason for s in skipped)


def test_what_looks_at_the_whole_vector_keeps_it():
    import transformers as tf

    from tiny import GQA, MLP, SIZES

    model = tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, **MLP, **GQA, head_dim=6))
    found, skipped = units_of(model)
    assert [u.kind for u in found] == [HEADS, CHANNELS]
    assert [(s.kind, "normalised" in s.reason) for s in skipped] == [(PAIRS, True)]
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **MLP, **GQA, num_local_experts=2))
    found, skipped = units_of(model)
    assert CHANNELS not in [u.kind for u in found] and any("experts" in s.reason for s in skipped)
    model = tiny("llama-gqa")
    layer = model.model.layers[0]
    layer.mlp.norm = torch.nn.LayerNorm(37)
    layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    plan = ResidentModel(tiny("llama-gqa")).outline
    found, skipped = find_units(layer, plan.in_layer(0), "model.layers.0.", model.config)
    assert not found and {s.kind for s in skipped} == {CHANNELS, HEADS}


def plant(model, *, duplicate=False, dead=False, constant=False, dead_head=False):
    """Units of the first block that can go without a trace."""
    block = model.model.layers[0]
    with torch.no_grad():
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            if duplicate:
                layer.weight[COPY[1]], layer.bias[COPY[1]] = layer.weight[COPY[0]], layer.bias[COPY[0]]
            if constant:
                layer.weight[CONSTANT], layer.bias[CONSTANT] = 0.0, 0.7
            if dead:
                layer.weight[DEAD], layer.bias[DEAD] = 0.0, 0.0
        if duplicate:  # both matter
            block.mlp.down_proj.weight[:, list(COPY)] += 1.0
        if dead_head:
            block.self_attn.v_proj.weight[:6] = 0.0
    return model


@pytest.mark.parametrize(
    "name, planted, channels",
    [
        ("modegpt", dict(duplicate=True, dead=True), 2),
        ("slimgpt", dict(duplicate=True, dead=True), 2),
        ("affine-ls", dict(duplicate=True, dead=True, constant=True), 3),
        ("flap", dict(dead=True, constant=True), 2),
        ("wanda-sp", dict(dead=True), 1),
        ("fold", dict(duplicate=True), 1),
    ],
)
def test_planted_channels_go_without_a_trace(name, planted, channels):
    block = block_of(plant(llama(), **planted), RECIPES[name])
    if name == "fold":  # nothing says that units are the same but their weights
        with torch.no_grad():
            block.module.mlp.down_proj.weight[:, COPY[1]] = block.module.mlp.down_proj.weight[:, COPY[0]]
    before = out(block)
    made = narrow(block, narrower(block.shape, block.recipe, channels, has_bias=True))
    assert block.module.mlp.down_proj.weight.shape == (24, 37 - channels)
    assert torch.allclose(out(block), before, rtol=0, atol=1e-9 * float(before.abs().max()))
    assert all(loss < 1e-6 for loss in made.losses.values())


@pytest.mark.parametrize("name", ["slimgpt", "flap", "wanda-sp", "affine-ls"])
def test_a_dead_head_goes_without_a_trace(name):
    recipe = dataclasses.replace(RECIPES[name], units=("channels", "heads"))
    block = block_of(plant(llama(), dead_head=True), recipe)
    before = out(block)
    narrow(block, narrower(block.shape, recipe, heads=1))
    assert block.module.self_attn.q_proj.weight.shape == (12, 24)
    assert block.module.self_attn.k_proj.weight.shape == (6, 24)
    assert torch.allclose(out(block), before, rtol=0, atol=1e-9 * float(before.abs().max()))


def test_a_unit_scaled_copy_is_found_by_balanced_folding():
    model = plant(llama(mlp_bias=False))
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[9] = mlp.gate_proj.weight[3]
        mlp.up_proj.weight[9] = 5.0 * mlp.up_proj.weight[3]
        mlp.down_proj.weight[:, 9] = mlp.down_proj.weight[:, 3] / 5.0
    block = block_of(model, RECIPES["fold"])
    before = out(block)
    narrow(block, narrower(block.shape, block.recipe, 1))
    assert torch.allclose(out(block), before, rtol=0, atol=1e-9 * float(before.abs().max()))


@pytest.mark.parametrize("score", ["wifv", "leverage", "obs"])
def test_losses_are_ordered_and_are_those_predicted(score):
    lost = {}
    for how in ("none", "bias", "ls", "affine-ls"):
        recipe = Structured(units=("channels",), score=score, compensate=how, statistics=("gram",), ridge=1e-4)
        block = block_of(llama(mlp_bias=False), recipe)
        seen = []
        handle = block.module.mlp.register_forward_hook(lambda m, a, o, seen=seen: seen.append(o))
        before = out(block)
        made = narrow(block, narrower(block.shape, recipe, 10))
        handle.remove()
        lost[how] = float((out(block) - before).norm() / seen[0].norm())
        if how in ("ls", "affine-ls"):
            assert made.losses["model.layers.0.mlp.down_proj"] == pytest.approx(lost[how], rel=1e-6)
    if (
        score != "wifv"
    ):  # selections differ by what scores look at, but for the score that looks at one channel at a time
        assert lost["ls"] < lost["none"]
    else:
        assert lost["affine-ls"] < lost["bias"] < lost["none"] and lost["affine-ls"] < lost["ls"] < lost["none"]


def test_the_order_of_neurons_does_not_matter():
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    for name in ("modegpt", "slimgpt", "affine-ls", "flap", "wanda-sp", "lorap", "fold"):
        results = []
        for permuted in (False, True):
            model = llama(seed=1)
            mlp = model.model.layers[0].mlp
            if permuted:
                with torch.no_grad():
                    for layer in (mlp.gate_proj, mlp.up_proj):
                        layer.weight.copy_(layer.weight[order].clone())
                        layer.bias.copy_(layer.bias[order].clone())
                    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order].clone())
            block = block_of(model, RECIPES[name])
            narrow(block, narrower(block.shape, block.recipe, 9, has_bias=True))
            results.append(out(block))
        assert torch.allclose(*results, rtol=1e-8, atol=1e-8), name


def test_sequential_recipes_see_the_narrowed_attention():
    recipe = RECIPES["slimgpt"]
    weights = {}
    for how in ("sequential", "in two steps", "at once"):
        block = block_of(llama(mlp_bias=False), dataclasses.replace(recipe, sequential=how == "sequential"))
        target = narrower(block.shape, recipe, 12, heads=1)
        if how == "in two steps":
            narrow(block, dataclasses.replace(target, channels=37))
            block = dataclasses.replace(block, shape=dataclasses.replace(target, channels=37))
        narrow(block, target)
        weights[how] = block.module.mlp.down_proj.weight
    assert torch.allclose(weights["sequential"], weights["in two steps"], atol=1e-12)
    assert not torch.allclose(weights["sequential"], weights["at once"], atol=1e-3)


@torch.no_grad()
def test_anchored_recipes_aim_at_the_dense_model():
    """W' and b' are the least squares fit of what the dense matrix makes of dense inputs, from the inputs that come."""
    for how in ("ls", "affine-ls"):
        recipe = dataclasses.replace(RECIPES["affine-ls"], compensate=how, score="wifv")
        block = block_of(llama(mlp_bias=False), recipe, layer=1)
        g = torch.Generator().manual_seed(5)
        noise = torch.randn(block.stream.hidden[0].shape, generator=g, dtype=torch.float64)
        block.stream.hidden = [block.stream.hidden[0] + 0.2 * noise]
        up, W = block.module.mlp.up_proj.weight.clone(), block.module.mlp.down_proj.weight.clone()
        seen = {}
        for name, stream in (("x", block.dense), ("z", block.stream)):

            def show(x, mask, name=name, seen=seen):
                seen[name] = x.flatten(0, -2)

            stream.observe(block.module, 1, 0, {"mlp.down_proj": show})
        made = narrow(block, narrower(block.shape, recipe, 12))
        kept = [int((up == row).all(1).nonzero()) for row in block.module.mlp.up_proj.weight]
        inputs = seen["z"][:, kept]
        if how == "affine-ls":
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
        wanted = seen["x"] @ W.T
        best = torch.linalg.lstsq(inputs, wanted).solution.T
        down = block.module.mlp.down_proj
        found = down.weight if down.bias is None else torch.cat([down.weight, down.bias[:, None]], 1)
        assert torch.allclose(found, best, atol=1e-7), how
        residual = float((wanted - inputs @ best.T).norm() / wanted.norm())
        assert made.losses["model.layers.1.mlp.down_proj"] == pytest.approx(residual, rel=1e-6)


def test_scores_can_be_compared_between_blocks():
    block = block_of(llama(), RECIPES["flap"])
    found = scores(block)
    assert set(found) == {CHANNELS, HEADS}
    assert found[CHANNELS].shape == (37,) and found[HEADS].shape == (2,)
    assert abs(float(found[CHANNELS].mean())) < 1e-12 and float(found[CHANNELS].std(correction=0)) == pytest.approx(1)
    assert abs(float(found[HEADS].mean())) < 1e-12  # columns are standardised, then averaged over heads


def test_padding_is_not_measured():
    for full in (True, False):
        recipe = Structured(units=("channels",), score="wifv", statistics=("gram",))
        block = block_of(llama(), recipe, padded=True)
        seen = []
        block.observe({"mlp.down_proj": lambda x, mask, seen=seen: seen.append(x[mask])})
        found = moments(block, ["mlp.down_proj"], full)["mlp.down_proj"]
        z = seen[0]
        assert found.count == len(z) == int(windows(8, 16, padded=True).mask.sum())
        assert torch.allclose(found.energy, z.square().mean(0)) and torch.allclose(found.mean, z.mean(0))
        assert torch.allclose(found.variance, z.var(0, correction=0)) and found.full == full
        assert torch.allclose(found.centred().energy, found.variance)


def test_few_tokens_are_regularised_with_one_warning():
    recipe = RECIPES["modegpt"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for layer in (0, 1):
            block = block_of(llama(), recipe, layer, samples=2, length=8)
            narrow(block, narrower(block.shape, recipe, 10, has_bias=True))
            assert torch.isfinite(out(block)).all()
    assert len([w for w in caught if "16 tokens" in str(w.message)]) == 1


def test_what_cannot_be_reached_is_refused():
    block = block_of(tiny("gpt2-conv1d", dtype=torch.float64), RECIPES["flap"])
    with pytest.raises(CorankError, match="no heads"):
        narrow(block, dataclasses.replace(block.shape, heads=2, kv_heads=2))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_architecture_and_dtype_survives(name):
    model = tiny(name)
    recipe = RECIPES["modegpt"]
    block = block_of(model, recipe)
    layers = {n: type(m) for n, m in block.module.named_modules()}
    before = copy.deepcopy(out(block))
    narrow(block, dataclasses.replace(block.shape, channels=block.shape.channels - 4))
    after = out(block)
    assert after.dtype == before.dtype and torch.isfinite(after).all()
    assert {n: type(m) for n, m in block.module.named_modules()} == layers
    assert float((after - before).norm() / before.norm()) < 0.6


def test_names_of_scores_are_those_that_there_are():
    assert set(SCORES) == set(FUNCTIONS) | {LEARNED}  # which are kept by who learns them
    for score in FUNCTIONS:
        recipe = Structured(units=("channels",), score=score, statistics=("gram",))
        if score == "taylor":
            continue  # it needs the gradients of the whole model: test_width_gradients.py
        block = block_of(llama(mlp_bias=False), recipe)
        narrow(block, narrower(block.shape, recipe, 5))
        assert block.module.mlp.down_proj.weight.shape == (24, 32)
    with pytest.raises(CorankError, match="score for compensate=none 'beauty'"):
        Structured(units=("channels",), score="beauty")
    with pytest.raises(CorankError, match="score for compensate=cluster 'wanda'"):
        Structured(units=("channels",), score="wanda", compensate="cluster")
