"""One basis for the residual stream: exact at full width, exact where the stream spans less."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from test_width_methods import IDS, compress, logits
from transformers import AutoModelForCausalLM

from corank.budget import Budget
from corank.errors import CorankError
from corank.model import ResidentModel
from corank.recipe import get
from corank.structured.recipe import Structured
from corank.structured.residual import residual_moment, rotate
from corank.structured.task import Task
from tiny import GQA, MLP, SIZES, saved, tiny, windows

CLOSE = 1e-5
"""Norms compute in float32, whatever the model does."""
FAMILIES = ["llama-gqa", "llama-tied", "qwen2-bias", "mistral"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task_of(model):
    recipe = get("slicegpt").recipe()
    return Task(ResidentModel(model), recipe, Budget(keep=0.8), windows(6, 16), torch.float64)


def with_gains(model):
    """The same with norms whose gains are not one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "norm" in name:
                p.copy_(1 + 0.3 * randn(*p.shape, seed=len(name)))
    return model


def qwen3():
    torch.manual_seed(0)
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, **MLP, **GQA, head_dim=6)).double().eval()


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3"])
def test_another_basis_is_the_same_model(name):
    model = with_gains(tiny(name, dtype=torch.float64) if name != "qwen3" else qwen3())
    before = logits(model)
    rotate(model, task_of(model), torch.linalg.qr(randn(24, 24, seed=1)).Q)
    assert torch.allclose(logits(model), before, rtol=0, atol=CLOSE * float(before.abs().max()))
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stream_in_a_subspace_is_cut_without_loss(name, tmp_path):
    """All that is written into the stream lies in 16 of 24 dimensions."""
    model = with_gains(tiny(name, dtype=torch.float64))
    basis = torch.linalg.qr(randn(24, 16, seed=2)).Q
    project = basis @ basis.T
    with torch.no_grad():
        if name == "llama-tied":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ project)
        for layer in model.model.layers:
            for producer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                producer.weight.copy_(project @ producer.weight)
    model.config.tie_word_embeddings = False
    before = logits(model)
    report = compress(model, "slicegpt", tmp_path / "out", keep=0.7)
    assert report.extra["structure"]["hidden_size"] == 16
    assert report.extra["structure"]["energy"] == pytest.approx(1.0, abs=1e-9)
    assert sum(site["params"] for site in report.sites) <= 0.7 * sum(site["params_dense"] for site in report.sites)
    scale = float(before.abs().max())
    assert torch.allclose(logits(model), before, rtol=0, atol=CLOSE * scale)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert torch.allclose(logits(plain), before, rtol=0, atol=CLOSE * scale) and plain.config.hidden_size == 16
    assert sum(p.numel() for p in plain.parameters()) == report.accounting["model"]["compressed"]
    uncached = plain.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(plain.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True), uncached)


def test_the_moment_is_that_of_what_norms_see():
    model = with_gains(tiny("llama-gqa", dtype=torch.float64))
    seen = []
    norms = [model.model.norm] + [
        n for l in model.model.layers for n in (l.input_layernorm, l.post_attention_layernorm)
    ]
    for norm in norms:
        norm.register_forward_hook(lambda m, args, out: seen.append((out / m.weight).flatten(0, -2)))
    found = residual_moment(task_of(model))
    seen.clear()
    with torch.no_grad():
        model(windows(6, 16).ids)
    X = torch.cat(seen)
    assert torch.allclose(found, X.T @ X / len(X), rtol=1e-4, atol=1e-4)  # eps of the norms is left out
    assert float(found.trace()) == pytest.approx(24, rel=1e-9)


def test_from_disk_to_disk_it_keeps_the_dtype(tmp_path):
    source = saved("llama-tied", tmp_path / "dense", dtype=torch.bfloat16)
    compress(str(source), "slicegpt", tmp_path / "out", keep=0.8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 16 and config["dtype"] == "bfloat16" and config["head_dim"] == 6
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    resident = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    compress(resident, "slicegpt", keep=0.8)
    assert torch.allclose(logits(plain), logits(resident), atol=0.05 * float(logits(resident).abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_model_may_be_what_counts(name):
    """A head that was the embedding costs as much as the embedding then."""
    model = tiny(name)
    dense = sum(p.numel() for p in model.parameters())
    compress(model, "slicegpt", keep=0.8, scope="model", multiple=1)
    after, width = sum(p.numel() for p in model.parameters()), model.config.hidden_size
    per_dimension = sum(p.numel() for p in model.parameters() if width in p.shape) // width
    assert after <= 0.8 * dense < after + per_dimension + 64


def test_everything_kept_and_bad_input():
    model = tiny("llama-gqa", dtype=torch.float64)
    before = logits(model)
    compress(model, "slicegpt", keep=1.0)
    assert torch.equal(logits(model), before)
    with pytest.raises(CorankError, match="families llama"):
        compress(tiny("gpt2-conv1d"), "slicegpt", keep=0.8)
    with pytest.raises(CorankError, match="leaves nothing"):
        compress(tiny("llama-gqa"), "slicegpt", keep=0.2)
    with pytest.raises(CorankError, match="leave allocate"):
        compress(tiny("llama-gqa"), "slicegpt", keep=0.8, allocate="entropic")
    with pytest.raises(CorankError, match="leave units"):
        Structured(units=("residual", "channels"))
