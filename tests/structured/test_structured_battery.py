"""Every registered structured method meets the same oracles without anyone writing a test for it."""

from __future__ import annotations

import pytest
import torch
from depth_cases import DATA, four_blocks, logits, some_ids

import corank
from corank import recipe
from corank.structured.recipe import Structured
from tiny import saved, tiny, tokenizer

METHODS = [m.name for m in recipe.methods(family="structured")]
DEPTH = [n for n in METHODS if recipe.get(n).recipe().depth is not None]
WIDTH = [n for n in METHODS if set(recipe.get(n).recipe().units) - {"residual"}]
SIZES = {"keep": 0.7}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def quick(name):
    """A short training, for methods that train; what it learns is tested in test_learning."""
    return {"steps": 6} if "steps" in recipe.get(name).parameters else {}


def compress(model, name, **settings):
    return corank.compress(model, name, tokenizer=tokenizer(), **{**SIZES, **quick(name), **settings}, **DATA)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_the_identity(name):
    model = tiny("qwen2-bias", dtype=torch.float64)
    before = logits(model, some_ids())
    compress(model, name, keep=1)
    assert torch.equal(logits(model, some_ids()), before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model_name", ["llama-gqa", "gpt2-conv1d", "qwen2-bias"])
def test_the_budget_is_met_and_every_parameter_counted(name, model_name):
    model = tiny(model_name)
    dense = parameters(model)
    if name == "slicegpt" and model_name == "gpt2-conv1d":
        with pytest.raises(corank.CorankError, match="families"):
            compress(model, name, keep=0.7)
        return
    report = compress(model, name, keep=0.7)
    sites = report.accounting["sites"]
    assert 0.3 * sites["dense"] < sites["compressed"] <= 0.7 * sites["dense"]
    assert report.accounting["model"] == {"dense": dense, "compressed": parameters(model)}
    assert sum(row["params"] for row in report.sites) == sites["compressed"]
    assert report.extra["structure"]["class"] in ("N0", "N1", "N2", "N4")


@pytest.mark.parametrize("name", METHODS)
def test_the_whole_model_can_be_what_the_budget_counts(name):
    model = tiny("llama-tied")
    dense = parameters(model)
    compress(model, name, keep=0.75, scope="model")
    assert parameters(model) <= 0.75 * dense


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_what_is_in_memory_from_disk_or_not(name, tmp_path):
    model = tiny("llama-gqa")
    inside = compress(model, name, out=tmp_path / "memory")
    folder = saved("llama-gqa", tmp_path / "dense")
    streamed = corank.compress(folder, name, out=tmp_path / "disk", **SIZES, **quick(name), **DATA)
    assert inside.extra["structure"] == streamed.extra["structure"]
    assert inside.accounting["model"] == streamed.accounting["model"]
    wanted = logits(model, some_ids())
    for where in ("memory", "disk"):
        loaded, _ = corank.load(tmp_path / where)
        torch.testing.assert_close(logits(loaded, some_ids()), wanted, rtol=1e-4, atol=1e-4)
        assert parameters(loaded) == streamed.accounting["model"]["compressed"]
        given = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        cached, plain = (loaded.generate(some_ids(), **given, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain)
    corank.verify(tmp_path / "disk")
    assert inside.ordinary == ("quantization_config" not in (tmp_path / "disk" / "config.json").read_text())


@pytest.mark.parametrize("name", METHODS)
def test_the_same_run_gives_the_same_model(name):
    pair = [tiny("llama-gqa") for _ in range(2)]
    for model in pair:
        compress(model, name)
    assert torch.equal(logits(pair[0], some_ids()), logits(pair[1], some_ids()))


# by the loss of a random model on random text another block may well be worth less than nothing; see test_depth for sleb
BY_ACTIVATIONS = [
    n for n in DEPTH if not recipe.get(n).recipe().merge and "loss" not in recipe.get(n).recipe().statistics
]


@pytest.mark.parametrize("name", BY_ACTIVATIONS)
def test_planted_identity_blocks_go_without_a_trace(name):
    model = four_blocks(identity=(1, 2))
    before = logits(model, some_ids())
    compress(model, name, keep=0.5)
    torch.testing.assert_close(logits(model, some_ids()), before, rtol=1e-10, atol=1e-10)


def with_needless_channels(model, copies):
    """17 channels of every feed-forward network are silent, or 8 of them copies of others."""
    with torch.no_grad():
        for block in model.model.layers:
            mlp = block.mlp
            for rows in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.mT):
                rows[20:] = 0
                if copies:
                    rows[20:28] = rows[:8]
    return model


COMPENSATED = [
    n for n in WIDTH if recipe.get(n).recipe().compensate in ("ls", "affine-ls", "cluster") and "lorap" not in n
]


@pytest.mark.parametrize("name", COMPENSATED)
def test_planted_copies_and_silent_channels_go_without_a_trace(name):
    """17 of 37 channels say nothing that the others do not."""
    made = recipe.get(name)
    # the leverage of two copies is half of what it would be alone: both may go, or stay
    model = with_needless_channels(four_blocks(), copies=made.recipe().score != "leverage")
    before = logits(model, some_ids())
    settings = {"attention": False} if "attention" in made.parameters else {}
    settings |= {"ridge": 1e-10} if made.recipe().compensate != "cluster" else {}
    dense = 4 * (3 * 24 * 37 + 24 * 24 * 2 + 24 * 12 * 2)
    kept = 4 * (3 * 24 * 21 + 24 * 24 * 2 + 24 * 12 * 2) + 4 * 24  # one more than is needed, and a bias if there is one
    corank.compress(
        model, name, keep=kept / dense, uniform=True, tokenizer=tokenizer(), **settings, **{**DATA, "samples": 24}
    )
    assert {block.mlp.up_proj.out_features for block in model.model.layers} <= {20, 21}
    scale = float(before.abs().max())
    torch.testing.assert_close(logits(model, some_ids()), before, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", WIDTH)
def test_one_width_everywhere_is_an_ordinary_checkpoint(name, tmp_path):
    model = tiny("llama-gqa")
    # factors are no ordinary checkpoint, whatever the widths
    attention = {"attention": False} if recipe.get(name).recipe().split is not None else {}
    report = compress(model, name, uniform=True, multiple_of=4, out=tmp_path / "small", **attention)
    blocks = report.extra["structure"]["blocks"]
    assert all(block == blocks[0] for block in blocks) and report.ordinary
    assert blocks[0]["channels"] % 4 == 0 or blocks[0]["channels"] == 37
    torch.testing.assert_close(logits(corank.load(tmp_path / "small")[0], some_ids()), logits(model, some_ids()))


@pytest.mark.parametrize("name", WIDTH)
def test_protected_blocks_keep_their_widths(name):
    model = four_blocks().float()
    before = {k: v.clone() for k, v in model.model.layers[0].state_dict().items()}
    attention = {"attention": False} if "attention" in recipe.get(name).parameters else {}
    report = compress(model, name, keep=0.8, protect="ends", **attention)
    blocks = report.extra["structure"]["blocks"]
    assert blocks[0]["channels"] == blocks[3]["channels"] == 37 and blocks[1]["channels"] < 37
    torch.testing.assert_close(model.model.layers[0].state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_is_told_in_one_sentence(name):
    for settings in ({"keep": 0.01}, {"keep": 0.5, "nonsense": 1}, {"keep": 0.5, "protect": "12"}):
        model = tiny("llama-gqa")
        before = logits(model, some_ids())
        with pytest.raises(corank.CorankError) as told:
            compress(model, name, **settings)
        assert "\n" not in str(told.value).strip() and str(told.value).rstrip().endswith((".", "?"))
        assert torch.equal(logits(model, some_ids()), before)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_documents_its_parameters(name):
    method = recipe.get(name)
    assert method.cite and method.summary.endswith(".") and method.kind is Structured
    assert set(method.common) == set(Structured.COMMON)
    for parameter in method.parameters:
        assert f"{parameter}:" in method.doc
