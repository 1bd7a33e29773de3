"""A directory written shard by shard, without a model in memory, is the same checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_models import compress, factors_of, make, outputs
from safetensors.torch import save_file

from corank import checkpoint
from corank.checkpoint.verify import sha256
from corank.errors import CorankError
from corank.factors import replace, weight_of


def write_shards(model, folder, shards=3):
    """As an engine would: its own files, `state_dict` names."""
    folder.mkdir()
    state = {k: v.clone() for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    names = []
    for index in range(shards):
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        part = dict(list(state.items())[index::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        names.append(name)
    return names


@pytest.mark.parametrize("shards,as_dict", [(1, True), (3, False)])
def test_finish_and_publish(tmp_path, shards, as_dict):
    model = compress(make("qwen2"))
    expected, modules = outputs(model), checkpoint.collect(model)
    model.config.architectures = [type(model).__name__]
    partial, out = tmp_path / "out.partial", tmp_path / "out"
    files = write_shards(model, partial, shards)
    config = json.loads(model.config.to_json_string()) if as_dict else model.config
    known = {files[0]: sha256(partial / files[0])} if as_dict and shards == 1 else files
    section = checkpoint.finish_directory(
        partial, config, modules, known, recipe={"name": "svd"}, provenance={"seed": 0}
    )
    assert set(section.files) == set(files)
    assert section.fingerprint == pytest.approx(checkpoint.fingerprint(model), rel=1e-12)
    assert not out.exists()
    assert checkpoint.publish(partial, out) == out and not partial.exists()
    checkpoint.verify(out)
    loaded, _ = checkpoint.load(out, tokenizer=False)
    assert torch.equal(outputs(loaded), expected)
    assert loaded.config.quantization_config.recipe == {"name": "svd"}
    assert (out / "modeling_corank.py").exists()


def test_norms_can_be_given_by_who_knows_them(tmp_path):
    model = compress(make("llama"))
    modules, norms = checkpoint.collect(model), checkpoint.fingerprint(model)
    partial = tmp_path / "out.partial"
    write_shards(model, partial)
    name = next(iter(modules))
    assert norms[name] == pytest.approx(
        checkpoint.norm_of([model.get_submodule(name).up.weight, model.get_submodule(name).down.weight])
    )
    section = checkpoint.finish_directory(partial, model.config, modules, fingerprint=norms)
    assert section.fingerprint is norms or section.fingerprint == norms
    with pytest.raises(CorankError, match="NaN or infinite"):
        checkpoint.finish_directory(partial, model.config, modules, fingerprint={name: float("nan")})


def test_a_missing_or_misshapen_factor_is_refused(tmp_path):
    model = compress(make("llama"))
    modules = checkpoint.collect(model)
    write_shards(model, tmp_path / "a")
    with pytest.raises(CorankError, match="hold no model.layers.9.mlp.up_proj"):
        absent = {"model.layers.9.mlp.up_proj": {"kind": "low_rank", "rank": 2, "shape": [4, 4]}}
        checkpoint.finish_directory(tmp_path / "a", model.config, {**modules, **absent})
    name = next(iter(modules))
    with pytest.raises(CorankError, match="do not belong together"):
        wrong = {**modules, name: {**modules[name], "rank": 2}}
        checkpoint.finish_directory(tmp_path / "a", model.config, wrong)


def test_a_factorized_head_unties_the_config(tmp_path):
    model = make("llama-tied")
    replace(model, "lm_head", factors_of("low_rank", weight_of(model.lm_head), 5).module())
    expected = outputs(model)
    model.config.architectures = [type(model).__name__]
    model.all_tied_weights_keys = {}
    write_shards(model, tmp_path / "p")
    checkpoint.finish_directory(tmp_path / "p", model.config, checkpoint.collect(model))
    loaded, _ = checkpoint.load(checkpoint.publish(tmp_path / "p", tmp_path / "out"), tokenizer=False)
    assert torch.equal(outputs(loaded), expected) and not loaded.config.tie_word_embeddings


def test_publish_does_not_overwrite(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(CorankError, match="already exists"):
        checkpoint.publish(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "file").read_text() == "b"
    (tmp_path / "c").mkdir()
    checkpoint.publish(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c" / "file").read_text() == "a"


def test_no_fallback_for_an_architecture_it_cannot_name(tmp_path):
    model = compress(make("llama"))
    config = json.loads(model.config.to_json_string())
    for index, change in enumerate(({"architectures": ["SomebodysModel"]}, {"model_type": "somebodys"})):
        write_shards(model, tmp_path / str(index))
        full = {"architectures": [type(model).__name__], **config, **change}
        checkpoint.finish_directory(tmp_path / str(index), full, checkpoint.collect(model))
        assert "auto_map" not in json.loads((tmp_path / str(index) / "config.json").read_text())
        assert not (tmp_path / str(index) / "modeling_corank.py").exists()


def test_an_auto_map_of_the_model_itself_is_left_alone(tmp_path):
    model = compress(make("llama"))
    write_shards(model, tmp_path / "p")
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "auto_map": {"AutoModelForCausalLM": "own.Model"}}
    checkpoint.finish_directory(tmp_path / "p", config, checkpoint.collect(model))
    auto_map = json.loads((tmp_path / "p" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "own.Model"
