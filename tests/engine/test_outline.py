"""Sites, groups and order are found by running the model on the meta device."""

from __future__ import annotations

import pytest
import torch

from corank.errors import CorankError
from corank.factors import is_conv1d, weight_of
from corank.model import ResidentModel, outline, select_sites
from tiny import MODELS, tiny

EXPECTED = {
    "llama-gqa": [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]],
    "qwen2-bias": [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]],
    "phi3-fused": [["qkv"], ["o"], ["gate_up"], ["down"]],
    "gpt2-conv1d": [["qkv"], ["o"], ["up"], ["down"]],
    "opt": [["q", "k", "v"], ["o"], ["up"], ["down"]],
    "bert": [["q", "k", "v"], ["o"], ["up"], ["down"]],
    "gemma": [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_come_in_execution_order_with_their_roles(name):
    plan = outline(tiny(name).config)
    for layer in range(plan.layers):
        groups: dict[str, list[str]] = {}
        for site in plan.in_layer(layer):
            groups.setdefault(site.group, []).append(site.role)
        assert list(groups.values()) == EXPECTED[name]


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_counts_are_those_of_the_model(name):
    model = tiny(name)
    plan = outline(model.config)
    assert plan.layers == 3
    assert plan.parameters == model.num_parameters()
    for site in plan.sites:
        module = model.get_submodule(site.name)
        assert tuple(weight_of(module).shape) == site.shape
        assert site.bias == (getattr(module, "bias", None) is not None)
        assert plan.local(site) in site.name


@pytest.mark.parametrize("name", MODELS)
def test_siblings_really_read_the_same_input(name):
    model = tiny(name)
    plan = outline(model.config)
    inputs = {}
    handles = [
        model.get_submodule(s.name).register_forward_pre_hook(
            lambda _m, args, n=s.name: inputs.__setitem__(n, args[0].detach().clone())
        )
        for s in plan.sites
    ]
    with torch.no_grad():
        model(input_ids=torch.randint(3, 64, (2, 8)))
    for handle in handles:
        handle.remove()
    for site in plan.sites:
        assert torch.equal(inputs[site.name], inputs[site.group])


def test_selection_by_role_glob_and_expression():
    sites = outline(tiny("llama-gqa").config).sites
    assert {s.role for s in select_sites(sites, ["q", "down"])} == {"q", "down"}
    assert {s.layer for s in select_sites(sites, ["*.layers.1.*"])} == {1}
    assert {s.role for s in select_sites(sites, [r"re:(gate|up)_proj$"])} == {"gate", "up"}
    assert not [s for s in select_sites(sites, ignore=["k", "v"]) if s.role in "kv"]


def test_an_unknown_role_names_the_nearest():
    with pytest.raises(CorankError, match="gate"):
        select_sites(outline(tiny("llama-gqa").config).sites, ["gates"])


def test_a_model_in_memory_is_outlined_without_touching_it():
    model = tiny("gpt2-conv1d")
    source = ResidentModel(model)
    assert all(is_conv1d(model.get_submodule(s.name)) for s in source.outline.sites)
    assert not any(p.is_meta for p in model.parameters())
