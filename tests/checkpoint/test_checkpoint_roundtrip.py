"""Save, load, save again, turn dense: every architecture, every kind, to the last bit."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from checkpoint_models import MODELS, compress, factors_of, make, outputs, share, tokenizer
from safetensors import safe_open

from corank import checkpoint
from corank.checkpoint import CorankConfig
from corank.errors import CorankError
from corank.factors import KINDS, DenseLinear, FactorizedLinear, LowRank, replace, weight_of

QKV = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]


def stored_keys(folder):
    keys = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            keys |= set(reader.keys())
    return keys


def compressed(name):
    model = make(name)
    return compress(share(model, QKV) if name.startswith("llama") else model)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    model = compressed(name)
    expected, out = outputs(model), tmp_path / "out"
    assert checkpoint.save(model, None, out, max_shard_size="20KB") == out
    assert not (tmp_path / "out.partial").exists() and not list(out.glob(".*"))

    # names on disk are those of state_dict for every factorized module
    modules = checkpoint.collect(model)
    names = {f"{site}.{part}" for site in modules for part in model.get_submodule(site).state_dict()}
    assert len(modules) >= 5 and names <= stored_keys(out)

    loaded, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(outputs(loaded), expected)
    assert checkpoint.collect(loaded) == modules
    for site, module in checkpoint.factorized(model).items():
        other = loaded.get_submodule(site)
        assert type(other) is type(module) and not other.training
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in module.parameters()]
    checkpoint.verify(out)
    checkpoint.verify(model)
    checkpoint.verify(loaded)

    # a plain save_pretrained writes the same thing again, without an entry for a file it does not copy
    loaded.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "auto_map" not in config and config["quantization_config"]["modules"] == modules
    again, _ = checkpoint.load(tmp_path / "again", tokenizer=False)
    assert torch.equal(outputs(again), expected)
    checkpoint.verify(tmp_path / "again")

    # dense again, and nothing of the format left
    dense = checkpoint.dequantize(again)
    assert not any(isinstance(module, FactorizedLinear) for module in dense.modules())
    dense_expected = outputs(dense)
    torch.testing.assert_close(dense_expected, expected, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    assert "corank" not in (tmp_path / "dense" / "config.json").read_text()
    plain, info = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(outputs(plain), dense_expected)
    assert torch.equal(outputs(loaded.dequantize()), dense_expected)  # the method transformers offers


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_tied_embeddings_stay_tied(name, tmp_path):
    model = compressed(name)
    checkpoint.save(model, None, tmp_path / "out")
    loaded, _ = checkpoint.load(tmp_path / "out", tokenizer=False)
    assert loaded.config.tie_word_embeddings
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["low_rank", "row_pivoted"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_factorizing_a_tied_head_unties_it(name, kind, tmp_path):
    model = make(name)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    layer = model.get_submodule(head)
    replace(model, head, factors_of(kind, weight_of(layer), 6).module(layer.bias))
    expected = outputs(model)
    checkpoint.save(model, None, tmp_path / "out")
    loaded, _ = checkpoint.load(tmp_path / "out", tokenizer=False)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(outputs(loaded), expected)


def test_a_head_that_must_stay_tied_is_refused(tmp_path):
    model = make("t5")
    replace(model, "lm_head", factors_of("low_rank", weight_of(model.lm_head), 6).module())
    with pytest.raises(CorankError, match="lm_head shares its weight .* as t5 requires; leave it dense"):
        checkpoint.save(model, None, tmp_path / "out")
    assert model.config.tie_word_embeddings and list(tmp_path.iterdir()) == []


def test_dtypes_devices_and_casts(tmp_path):
    model = compress(make("mistral", torch.bfloat16))
    expected = outputs(model)
    checkpoint.save(model, tokenizer(), tmp_path / "out")
    loaded, words = checkpoint.load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and torch.equal(outputs(loaded), expected)
    assert words("w3 w5")["input_ids"] == [3, 5]
    mapped, _ = checkpoint.load(tmp_path / "out", device=torch.device("cpu"))
    assert torch.equal(outputs(mapped), expected)
    wide, _ = checkpoint.load(tmp_path / "out", dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(outputs(wide), expected.float(), rtol=0.1, atol=0.02)
    # the norms allow for the rounding of a cast down, from any dtype to any other
    checkpoint.save(wide, None, tmp_path / "wide")
    for dtype in (torch.bfloat16, torch.float16):
        narrow, _ = checkpoint.load(tmp_path / "wide", dtype=dtype, tokenizer=False)
        assert narrow.dtype == dtype
    for module in checkpoint.factorized(narrow.float()).values():  # casting a loaded model is allowed
        for key, tensor in module.state_dict().items():
            assert tensor.dtype == (torch.int32 if key == "pivots" else torch.float32)


def test_disk_offload_computes_the_same(tmp_path):
    model = compress(make("llama"))
    assert any(
        "pivoted" in spec["kind"] and spec["rank"] for spec in checkpoint.collect(model.model.layers[1]).values()
    )
    expected = outputs(model)
    checkpoint.save(model, None, tmp_path / "out")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    for buffers in (False, True):
        loaded, _ = checkpoint.load(
            tmp_path / "out",
            device=places,
            tokenizer=False,
            offload_folder=str(tmp_path / "offload"),
            offload_buffers=buffers,
        )
        assert torch.equal(outputs(loaded), expected)


def test_with_and_without_a_head(tmp_path):
    model = compress(make("llama"))
    layer = model.lm_head
    replace(model, "lm_head", factors_of("low_rank", weight_of(layer), 6).module())
    checkpoint.save(model, None, tmp_path / "out")
    ids = torch.arange(10)[None]
    expected = model.model(ids).last_hidden_state
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(base(ids).last_hidden_state, expected)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(other.model(ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.model(ids).last_hidden_state, expected)


def test_a_bias_that_the_architecture_lacks_survives(tmp_path):
    model = make("mistral")
    W, shift = weight_of(model.model.layers[0].mlp.up_proj), torch.randn(37)
    replace(model, "model.layers.0.mlp.up_proj", factors_of("low_rank", W, 5).module(shift))
    replace(model, "model.layers.1.mlp.up_proj", factors_of("dense", W, 5).module(shift))
    replace(model, "model.layers.0.mlp.gate_proj", factors_of("dense", W, 5).module())
    expected = outputs(model)
    checkpoint.save(model, None, tmp_path / "out")
    checkpoint.verify(tmp_path / "out")
    loaded, _ = checkpoint.load(tmp_path / "out", tokenizer=False)
    assert torch.equal(outputs(loaded), expected)
    assert set(checkpoint.collect(loaded)) == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}
    assert isinstance(loaded.model.layers[1].mlp.up_proj, DenseLinear)
    with pytest.warns(UserWarning, match="1 sites .*model.layers.0.mlp.up_proj.* have a bias"):
        checkpoint.dequantize(loaded)
    torch.testing.assert_close(outputs(loaded), expected, rtol=1e-4, atol=1e-5)


def test_a_dense_model_is_written_as_a_dense_checkpoint(tmp_path):
    model = make("llama")
    checkpoint.save(model, tokenizer(), tmp_path / "out", documents={"README.md": "card"})
    assert (tmp_path / "out" / "README.md").read_text() == "card"
    assert not (tmp_path / "out" / "modeling_corank.py").exists()
    loaded, words = checkpoint.load(tmp_path / "out")
    assert torch.equal(outputs(loaded), outputs(model)) and words is not None
    checkpoint.verify(tmp_path / "out")
    assert checkpoint.dequantize(loaded) is loaded


def test_metadata_is_kept_through_load_and_save(tmp_path):
    model = compress(make("llama"))
    checkpoint.save(model, None, tmp_path / "one", recipe={"name": "svd"}, plan={"x": [1]}, provenance={"seed": 0})
    loaded, _ = checkpoint.load(tmp_path / "one", tokenizer=False)
    checkpoint.save(loaded, None, tmp_path / "two", provenance={"seed": 1})
    section = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    assert section["recipe"] == {"name": "svd"} and section["plan"] == {"x": [1]}
    assert section["provenance"] == {"seed": 1} and section["format_version"] == 1
    assert section["quant_method"] == "corank" and list(section["files"]) == ["model.safetensors"]
    assert CorankConfig.from_dict({**section, "something_new": 1}).to_dict() == section


def test_attach_makes_plain_save_pretrained_work(tmp_path):
    model = compress(make("opt"))
    checkpoint.attach(model, recipe={"name": "svd"})
    model.save_pretrained(tmp_path / "out")
    loaded, _ = checkpoint.load(tmp_path / "out", tokenizer=False)
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.config.quantization_config.recipe == {"name": "svd"}


def test_rank_is_read_back_as_saved(tmp_path):
    model = make("llama")
    for index, k in enumerate((0, 24)):
        name = f"model.layers.{index}.self_attn.q_proj"
        replace(model, name, LowRank(torch.randn(24, k), torch.randn(k, 24)).module())
    checkpoint.save(model, None, tmp_path / "out")
    loaded, _ = checkpoint.load(tmp_path / "out", tokenizer=False)
    assert [loaded.model.layers[i].self_attn.q_proj.rank for i in (0, 1)] == [0, 24]
    assert torch.equal(outputs(loaded), outputs(model))


def test_registration_can_be_repeated_and_takes_over_from_the_fallback():
    from transformers.quantizers import auto

    class Other:
        pass

    auto.AUTO_QUANTIZER_MAPPING["corank"] = Other
    for _ in range(2):
        checkpoint.register()
        assert auto.AUTO_QUANTIZER_MAPPING["corank"] is checkpoint.CorankQuantizer
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["corank"] is CorankConfig


def test_every_kind_has_a_layer_in_the_shipped_fallback():
    from corank.checkpoint import modeling_corank

    assert set(modeling_corank.KINDS) == set(KINDS)
