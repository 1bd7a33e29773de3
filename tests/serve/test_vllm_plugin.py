"""How vLLM finds the plug-in, what it tells vLLM, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers as tf
import vllm_stand_in as stand_in
from torch import nn

from corank.checkpoint.config import FORMAT_VERSION
from corank.cli import main
from corank.errors import CorankError
from corank.factors import KINDS as ALL_KINDS
from corank.serve.vllm.specs import KINDS, stored_names
from corank.serve.vllm_plugin import register
from tiny import tokenizer

ROOT = Path(__file__).resolve().parents[2]


def spec(kind="low_rank", **more):
    return {"kind": kind, "rank": 2, "shape": [6, 4], "bias": False, **more}


def section(modules, **more):
    return {"quant_method": "corank", "format_version": FORMAT_VERSION, "modules": modules, **more}


@pytest.fixture
def config_class():
    with stand_in.installed():
        register()
        yield stand_in.CUSTOM["corank"]


def entry_point():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]


def test_entry_point_leads_to_register():
    module, _, function = entry_point()["corank"].partition(":")
    assert getattr(import_module(module), function) is register


def test_without_vllm(monkeypatch):
    """The module that the entry point names can be imported; calling it says what is missing."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(CorankError, match="Serving with vLLM needs vLLM .*pip install vllm"):
        register()


def test_registering_twice_is_harmless():
    with stand_in.installed():
        register()
        first = stand_in.CUSTOM["corank"]
        register()
        assert stand_in.METHODS.count("corank") == 1 and stand_in.CUSTOM == {"corank": first}
        assert issubclass(first, stand_in.QuantizationConfig)
        with pytest.raises(ValueError, match="already exists"):  # what vLLM does to those who do not look
            stand_in.register_quantization_config("corank")(first)
    assert "corank" not in stand_in.METHODS


def test_what_vllm_asks(config_class):
    config = config_class.from_config(
        section({"model.layers.0.mlp.down_proj": spec()}, provenance={"seed": 0}, later=1)
    )
    assert config.get_name() == "corank" and config_class.get_config_filenames() == []
    assert torch.bfloat16 in config.get_supported_act_dtypes() and config_class.get_min_capability() <= 80
    assert config.packed_modules_mapping == {}
    down = config.specs["model.layers.0.mlp.down_proj"]
    assert (down.kind, down.rank, down.shape, down.bias, down.basis) == ("low_rank", 2, (6, 4), False, None)


def test_the_kinds_that_are_served_exist():
    assert set(KINDS) <= set(ALL_KINDS)


@pytest.mark.parametrize(
    "changed,message",
    [
        (section({}, format_version=FORMAT_VERSION + 1), f"corank format {FORMAT_VERSION + 1} .*upgrade"),
        (section({"a.b": spec("hyperbolic")}), "a.b: the vLLM plug-in serves the kinds .*'hyperbolic'"),
        (section({"a.b": {"rank": 2, "shape": [6, 4]}}), "a.b: the vLLM plug-in serves the kinds .*None"),
        (section({"a.b": {"kind": "cur", "rank": 2}}), "a.b: its entry in config.json has no shape"),
        (section({"a.b": spec("shared")}), "a.b: its entry in config.json names no basis"),
        (section({"a.b": spec(quantized={"up": {"bits": 8}})}), "a.b: its factors are quantized"),
        (
            section({"a.experts.3.down": spec()}),
            "a.experts.3.down is factorized, .*factorized experts; leave them dense",
        ),
        (section({"a.wte": spec(form="embedding")}), "a.wte is factorized, .*form 'embedding'; leave them dense"),
    ],
)
def test_checkpoints_that_cannot_be_served(changed, message, config_class):
    with pytest.raises(CorankError, match=message) as caught:
        config_class.from_config(changed)
    assert "\n" not in str(caught.value)


def test_method_of_each_layer(config_class):
    """Factorized where any of the fused matrices is, else vLLM's own."""
    names = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    config = config_class.from_config(section({name: spec() for name in names}))
    config.packed_modules_mapping = stand_in.PACKED
    linear = stand_in.LinearBase(4, 6, False, None, None, "")

    def stored(prefix):
        method = config.get_quant_method(linear, prefix)
        if type(method) is stand_in.UnquantizedLinearMethod:
            return None
        return [(name.removeprefix("model.layers."), found and found.kind) for name, found in method.stored]

    qkv = [("0.self_attn.q_proj", None), ("0.self_attn.k_proj", "low_rank"), ("0.self_attn.v_proj", None)]
    assert stored("model.layers.0.self_attn.qkv_proj") == qkv
    assert stored("model.layers.1.mlp.gate_up_proj") == [("1.mlp.gate_proj", None), ("1.mlp.up_proj", "low_rank")]
    assert stored("model.layers.1.mlp.down_proj") == [("1.mlp.down_proj", "low_rank")]
    for prefix in (
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.10.mlp.down_proj",
    ):
        assert stored(prefix) is None
    methods = [config.get_quant_method(linear, names[2]) for _ in range(2)]
    assert methods[0] is not methods[1]  # a method belongs to one layer


@pytest.mark.parametrize("packed", [{}, {"other": ["q", "k"]}, stand_in.PACKED])
def test_names_of_fused_matrices(packed):
    """A model that does not say what it fuses is understood all the same."""
    assert stored_names("a.qkv_proj", packed, {}) == ["a.q_proj", "a.k_proj", "a.v_proj"]
    assert stored_names("a.gate_up_proj", packed, {}) == ["a.gate_proj", "a.up_proj"]
    assert stored_names("a.gate_up_proj", packed, {"a.gate_up_proj": spec()}) == ["a.gate_up_proj"]
    assert stored_names("o_proj", packed, {}) == ["o_proj"]
    assert stored_names("qkv_proj.qkv_proj", {"qkv_proj": ["x", "y"]}, {}) == ["qkv_proj.x", "qkv_proj.y"]


def test_layers_that_are_not_linear(config_class):
    """Attention, embeddings, experts that were left dense: vLLM's own business. A factorized head is refused."""
    config = config_class.from_config(
        section({name: spec() for name in ("lm_head", "model.layers.0.self_attn.q_proj")})
    )
    for prefix in ("model.embed_tokens", "model.layers.0.self_attn", "model.layers.0.mlp.experts", ""):
        assert config.get_quant_method(nn.Module(), prefix) is None
    with pytest.raises(
        CorankError, match="lm_head is factorized, and the vLLM plug-in cannot serve a factorized Module"
    ):
        config.get_quant_method(nn.Module(), "lm_head")


def test_a_model_that_renames(config_class):
    """Rules are written for tensors; here they have to fit modules, whose names have no tail."""
    modules = {
        "model.language_model.layers.0.mlp.fc1": spec(),
        "model.language_model.layers.0.mlp.fc2": spec("shared", basis="model.language_model.layers.0.mlp.fc1"),
        "model.visual.proj": spec(),
        "mtp.fc": spec(),
    }
    config = config_class.from_config(section(modules))
    mapper = stand_in.WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "model.visual.": "visual.", "mtp.": None},
        orig_to_new_substr={".mlp.fc1.": ".mlp.up_proj."},
    )
    config.apply_vllm_mapper(mapper)
    up, down = "language_model.model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.fc2"
    assert set(config.specs) == {up, down, "visual.proj"}
    assert config.specs[down].basis == up and all(name == found.name for name, found in config.specs.items())
    config.apply_vllm_mapper(stand_in.WeightsMapper(orig_to_new_suffix={".weight": ".w", "proj": "projection"}))
    assert set(config.specs) == {f"{up}ection", down, "visual.projection"}


def test_the_config_travels_between_processes(config_class):
    """It is pickled for the workers and copied for draft models; the layers that were built are not."""
    config = config_class.from_config(section({"fc1": spec()}))
    layer = stand_in.ColumnParallelLinear(4, 6, bias=False, quant_config=config, prefix="fc1")
    assert config.homes["fc1"][0] is layer
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin.specs == config.specs and twin.homes == {} and type(twin) is config_class
    assert config.homes["fc1"][0] is layer


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys, config_class):
    """On a tiny stand-in for the model they name; what they write is what the plug-in reads."""
    sizes = dict(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(tmp_path / "smollm2-135m")
    tokenizer().save_pretrained(tmp_path / "smollm2-135m")
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/vllm.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, flags=re.S) for line in block.splitlines()]
    assert [line.split()[1] for line in commands] == ["compress", "dequantize"]
    for line in commands:
        assert main([*shlex.split(line)[1:], "--quiet"]) == 0, f"{line}\n{capsys.readouterr().err}"
    settings = json.loads((tmp_path / "small" / "config.json").read_text())
    specs = config_class.from_config(settings["quantization_config"]).specs
    assert specs and all(found.rank % 8 == 0 for found in specs.values())
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
