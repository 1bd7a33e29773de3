"""What people get wrong around a checkpoint, each answered by one sentence that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_models import compress, factors_of, make, outputs, tokenizer
from huggingface_hub import constants

import corank
import tiny
from corank import checkpoint
from corank.checkpoint import modeling_corank
from corank.cli import main
from corank.errors import CorankError
from corank.factors import LowRank, replace, weight_of
from corank.model import resolve


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# A config that belongs to another model


@pytest.fixture
def folder(tmp_path):
    return checkpoint.save(compress(make("llama")), tokenizer(), tmp_path / "small")


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj", "model.layers.0.mlp.up_prj", "elsewhere.up_proj"])
def test_a_map_that_names_sites_the_model_does_not_have(name, folder):
    spec = {"kind": "low_rank", "rank": 2, "shape": [37, 24], "bias": False}
    edit(folder, lambda c: c["quantization_config"]["modules"].update({name: spec}))
    for load in (checkpoint.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CorankError, match=f"{name} is stored as factors, and LlamaForCausalLM has no such module"):
            load(folder)
    with pytest.raises(CorankError, match=f"hold no {name}"):
        checkpoint.verify(folder)


def test_a_class_without_the_head_may_leave_the_head_out_but_nothing_else(tmp_path):
    model = compress(make("llama"))
    replace(model, "lm_head", factors_of("low_rank", weight_of(model.lm_head), 6).module())
    folder = checkpoint.save(model, None, tmp_path / "out")
    assert transformers.AutoModel.from_pretrained(folder) is not None
    spec = {"kind": "low_rank", "rank": 2, "shape": [37, 24], "bias": False}
    edit(folder, lambda c: c["quantization_config"]["modules"].update({"model.layers.9.mlp.up_proj": spec}))
    with pytest.raises(CorankError, match="LlamaModel has no such module"):
        transformers.AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_a_config_that_ties_what_is_stored_as_factors(name, tmp_path):
    model = make(name)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    layer = model.get_submodule(head)
    replace(model, head, factors_of("low_rank", weight_of(layer), 6).module(layer.bias))
    due = outputs(model)
    folder = checkpoint.save(model, None, tmp_path / "out")
    edit(folder, lambda c: c.update(tie_word_embeddings=True))
    for load in (lambda: checkpoint.load(folder, tokenizer=False), lambda: type(model).from_pretrained(folder)):
        with pytest.raises(CorankError, match=f'ties {head} .* set "tie_word_embeddings": false'):
            load()
    edit(folder, lambda c: c.update(tie_word_embeddings=False))
    assert torch.equal(outputs(checkpoint.load(folder, tokenizer=False)[0]), due)


# Loaded without corank


def test_the_message_without_corank_names_the_package(folder):
    """At the verbosity that people have, not at that of the tests."""
    code = (
        "import sys, transformers\n"
        "try: transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except RuntimeError as error: print('STOPPED', 'corank' in sys.modules)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"} | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["STOPPED", "False"], run.stderr[-2000:]
    assert "Unknown quantization type, got corank" in run.stderr


def test_verify_knows_a_model_that_was_forced_to_load_without_corank(folder):
    model = make("llama")  # as `ignore_mismatched_sizes=True` leaves it: random, with the config as a dict
    model.config.quantization_config = json.loads((folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(CorankError, match="loaded before corank was imported.*`pip install corank`.*`import corank`"):
        corank.verify(model)


@pytest.mark.parametrize("change", [{"kind": "monarch"}, {"form": "stack"}])
def test_the_shipped_module_refuses_what_it_does_not_know(change):
    """It may be asked for another checkpoint than the one it lies beside, made by a later corank."""
    spec = {"kind": "low_rank", "rank": 2, "shape": [4, 4]}
    assert modeling_corank.CorankConfig(format_version=1, modules={"a": spec}).modules
    with pytest.raises(ValueError, match="upgrade with `pip install -U corank`"):
        modeling_corank.CorankConfig(format_version=1, modules={"a": spec | change})


# Mixed dtypes


def test_factors_of_two_dtypes_are_refused(tmp_path):
    model = make("llama")
    name = "model.layers.0.mlp.up_proj"
    replace(model, name, LowRank(torch.randn(37, 5), torch.randn(5, 24)).module())
    model.model.layers[0].mlp.up_proj.down.to(torch.bfloat16)
    with pytest.raises(CorankError, match=f"{name}: its factors mix bfloat16 and float32; cast the model"):
        checkpoint.save(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_two_dtypes_is_saved_with_a_warning(tmp_path):
    model = compress(make("llama"))
    model.model.layers[1].mlp.to(torch.bfloat16)
    with pytest.warns(
        UserWarning, match=r"mixes bfloat16 and float32; .* first one, float32. .*model.to\(torch.float32\)"
    ):
        checkpoint.save(model, None, tmp_path / "out")
    loaded, _ = checkpoint.load(tmp_path / "out", tokenizer=False)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(loaded), outputs(model.float()))


def test_parameters_that_the_architecture_keeps_in_float32_are_no_mixture(tmp_path):
    model = compress(make("t5", torch.float16))
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.save(model, None, tmp_path / "out")
    loaded, _ = checkpoint.load(tmp_path / "out", tokenizer=False)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


def test_a_mixed_model_gives_the_same_checkpoint_from_memory_and_from_disk(tmp_path):
    def mixed():
        model = tiny.tiny("llama-gqa", dtype=torch.bfloat16)
        for layer in model.model.layers:
            layer.self_attn.o_proj.float()
            layer.input_layernorm.float()
        return model

    mixed().save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="mixes"):
        corank.compress(mixed(), "svd", keep=0.7, out=tmp_path / "memory")
    corank.compress(tmp_path / "dense", "svd", keep=0.7, out=tmp_path / "streamed")
    one, two = (checkpoint.load(tmp_path / name, tokenizer=False)[0] for name in ("memory", "streamed"))
    for model in (one, two):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert one.state_dict().keys() == two.state_dict().keys()
    assert torch.equal(outputs(one), outputs(two))


# Places that cannot be written to, models that cannot be had


def test_an_output_directory_that_cannot_be_made(tmp_path, capsys):
    """A file in the way stops every user, the superuser included."""
    tiny.saved("llama-gqa", tmp_path / "dense")
    (tmp_path / "words.txt").write_text(tiny.text())
    corank.compress(tmp_path / "dense", "svd", keep=0.7, out=tmp_path / "small")
    (tmp_path / "file").write_text("precious")
    before = sorted(p.name for p in tmp_path.iterdir())
    small, out = str(tmp_path / "small"), str(tmp_path / "file" / "out")
    for arguments in (
        ["compress", str(tmp_path / "dense"), "--method", "svd", "--keep", "0.7", "--no-eval"],
        ["dequantize", small],
        ["export", small, "--format", "dense"],
        ["export", small, "--format", "torch"],
    ):
        assert main([*arguments, "--out", out, "--quiet"]) == 2, arguments
        said = capsys.readouterr().err
        assert said.startswith("corank: C") and said.count("\n") == 1 and "Not a directory" in said
    with pytest.raises(CorankError, match="Not a directory"):
        checkpoint.quantize_factors(small, out=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can write everywhere")
def test_a_read_only_directory(tmp_path):
    model = compress(make("llama"))
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(CorankError, match="Could not write .*Permission denied"):
        checkpoint.save(model, None, tmp_path / "locked" / "out")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_file_system_that_refuses(error, tmp_path, monkeypatch):
    model, make_directory = compress(make("llama")), Path.mkdir

    def refuse(self, *args, **kwargs):
        if self.name.endswith(".partial"):
            raise error
        return make_directory(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CorankError, match=f"Could not write .*{error.strerror}.*Nothing has been kept"):
        checkpoint.save(model, None, tmp_path / "out")
    tiny.saved("llama-gqa", tmp_path / "dense")
    with pytest.raises(CorankError, match=f"Cannot create .*{error.strerror}"):
        corank.compress(tmp_path / "dense", "svd", keep=0.7, out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub, source, keep=lambda name: True):
    """Put a directory into the cache as `hf download some/model` would."""
    place = hub / "models--some--model"
    shutil.copytree(source, place / "snapshots" / "abc", ignore=lambda _, names: [n for n in names if not keep(n)])
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")


def test_a_hub_model_in_the_cache_is_compressed_and_served_from_there(hub, tmp_path, capsys):
    tiny.saved("llama-gqa", tmp_path / "dense", shard="20KB")
    cached(hub, tmp_path / "dense")
    assert resolve("some/model").is_relative_to(hub)
    run = ["--method", "svd", "--keep", "0.7", "--no-eval", "--quiet"]
    assert main(["compress", "some/model", *run, "--out", str(tmp_path / "out")]) == 0
    corank.compress(tmp_path / "dense", "svd", keep=0.7, out=tmp_path / "due")
    one, two = (checkpoint.load(tmp_path / name)[0] for name in ("out", "due"))
    assert torch.equal(outputs(one), outputs(two))
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "some/model"' in card


@pytest.mark.parametrize("part", ["nothing", "tokenizer"])
def test_a_hub_model_that_is_not_in_the_cache_names_the_command_that_fetches_it(part, hub, tmp_path, capsys):
    if part == "tokenizer":
        tiny.saved("llama-gqa", tmp_path / "dense")
        cached(hub, tmp_path / "dense", keep=lambda name: not name.endswith(".safetensors"))
    for arguments in (
        ["eval", "some/model"],
        ["compress", "some/model", "--keep", "0.8", "--out", str(tmp_path / "out")],
    ):
        assert main([*arguments, "--quiet"]) == 2
        said = capsys.readouterr().err
        assert "`hf download some/model` fetches it" in said and "HF_HUB_OFFLINE" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
