"""Every method that narrows blocks, from a model to a directory and back."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import corank
from corank import cli
from corank.errors import CorankError
from corank.model import Text
from corank.recipe import methods
from tiny import GQA, MLP, SIZES, saved, text, tiny, tokenizer

NAMES = sorted(m.name for m in methods(family="structured") if m.recipe().units)
IDS = torch.tensor([[5, 9, 17, 33, 60, 7, 8, 21]])


def compress(model, method, out=None, **settings):
    options = dict(data=Text(text(9000), "words"), samples=16, length=24, tokenizer=tokenizer(), out=out)
    return corank.compress(model, method, **{**options, **settings})


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("name", NAMES)
def test_everything_kept_is_the_same_model(name):
    model = tiny("llama-gqa", dtype=torch.float64)
    before = logits(model)
    compress(model, name, keep=1.0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_directory_reloads_and_its_size_is_what_the_report_says(name, tmp_path):
    model = tiny("llama-gqa", dtype=torch.float64)
    dense = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    report = compress(model, name, tmp_path / "out", keep=0.8)
    assert sum(site["params"] for site in report.sites) <= 0.8 * dense
    loaded, _ = corank.load(tmp_path / "out", dtype=torch.float64)
    assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-12)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in loaded.parameters())
    assert sum(t.numel() for t in stored.values()) == report.accounting["model"]["compressed"]
    uncached = loaded.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=True), uncached)


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_modegpt_uniform_is_an_ordinary_checkpoint(keep, tmp_path):
    """At keep=0.5 heads lose dimensions too: other rotary frequencies, and queries scaled for the old root of the size."""
    source = saved("llama-gqa", tmp_path / "dense", dtype=torch.float32)
    compress(str(source), "modegpt", tmp_path / "out", keep=keep, uniform=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "llama"
    assert (config["head_dim"] == 6) == (keep == 0.8) and config["intermediate_size"] < 37
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    resident = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    compress(resident, "modegpt", keep=keep, uniform=True)
    assert torch.allclose(logits(plain), logits(resident), atol=1e-3)
    uncached = plain.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(plain.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=True), uncached)


def test_bad_input(tmp_path):
    with pytest.raises(CorankError, match="cap|have to stay"):
        compress(tiny("llama-gqa"), "modegpt", keep=0.05)
    with pytest.raises(CorankError, match="one of them out"):
        compress(tiny("llama-gqa"), "flap", keep=0.8, uniform=True, protect="ends")
    experts = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **MLP, **GQA, num_local_experts=2))
    with pytest.raises(CorankError, match="None of the units channels can be taken out"):
        compress(experts, "fold", keep=0.8)
    with pytest.raises(CorankError, match="anchored=true needs"):
        compress(tiny("llama-gqa"), "flap", keep=0.8, anchored=True)
    with pytest.raises(CorankError, match="score for compensate=ls"):
        compress(tiny("llama-gqa"), "modegpt", keep=0.8, selector="beauty")
    report = compress(tiny("gpt2-conv1d"), "flap", keep=0.8)
    assert any("The heads before transformer.h.0.attn.c_proj and 2 more stay" in w for w in report.warnings)


def test_different_widths_and_smaller_heads_stream_from_disk_to_disk(tmp_path):
    """The model in memory and the one on disk become the same, heads of fewer dimensions included."""
    source = saved("llama-gqa", tmp_path / "dense")
    compress(str(source), "modegpt", tmp_path / "out", keep=0.5)
    resident = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    report = compress(resident, "modegpt", tmp_path / "other", keep=0.5)
    widths = {block["channels"] for block in report.extra["structure"]["blocks"]}
    assert len(widths) > 1 and {block["head_dim"] for block in report.extra["structure"]["blocks"]} == {4}
    for folder in ("out", "other"):
        loaded, _ = corank.load(tmp_path / folder, dtype=torch.float32)
        assert torch.allclose(logits(loaded), logits(resident), atol=1e-3)
        uncached = loaded.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(loaded.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=True), uncached)


@pytest.mark.parametrize("name", ["gpt2-conv1d", "phi3-fused", "qwen2-bias", "opt", "gemma"])
def test_other_architectures(name, tmp_path):
    for method in ("modegpt", "affine-ls"):
        model = tiny(name)
        compress(model, method, tmp_path / method, keep=0.85)
        loaded, _ = corank.load(tmp_path / method, dtype=torch.float32)
        assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-bias", "gemma", "mistral", "llama-tied"])
def test_smaller_heads_in_other_families_are_ordinary_too(name, tmp_path):
    model = tiny(name)
    compress(model, "modegpt", tmp_path / "out", keep=0.5, uniform=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert plain.config.model_type == model.config.model_type and plain.config.head_dim < (8 if name == "gemma" else 6)
    assert torch.allclose(logits(plain), logits(model), atol=1e-3)


def test_the_command_line(tmp_path, capsys):
    source = saved("llama-gqa", tmp_path / "dense")
    (tmp_path / "t.txt").write_text(text(9000))
    command = [
        "compress",
        str(source),
        "--method",
        "flap",
        "--keep",
        "0.8",
        "--no-eval",
        "--data",
        str(tmp_path / "t.txt"),
    ]
    command += ["--samples", "16", "--length", "24", "--set"]
    assert cli.main([*command, "uniform=true", "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] and config["intermediate_size"] < 37 and "quantization_config" not in config
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert cli.main([*command, "compensate=wrong", "--out", str(tmp_path / "no")]) == 2
    assert "Unknown compensation 'wrong'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
