"""Gates on channels, heads and dimensions of the residual stream: what they do, and that weights can say the same."""

from __future__ import annotations

import pytest
import torch
from depth_cases import logits, some_ids

from corank.errors import CorankError
from corank.gates import Gates, Plain
from corank.model import ResidentModel
from corank.structured.gated import HIDDEN, fold_units, hidden_place, unit_place
from corank.structured.hidden import select_hidden, selectable, step_of
from corank.structured.units import CHANNELS, HEADS, find_units
from tiny import tiny

CLOSE = 1e-5
"""Norms compute in float32, whatever the model."""

MODELS = ("llama-gqa", "llama-tied", "qwen2-bias", "gpt2-conv1d")


def open_model(name):
    model = tiny(name, dtype=torch.float64)
    outline = ResidentModel(model).outline
    units = []
    for layer in range(outline.layers):
        path = outline.path(layer)
        found, _ = find_units(model.get_submodule(path), outline.in_layer(layer), f"{path}.", model.config)
        units += [u for u in found if u.kind in (CHANNELS, HEADS)]
    return model, outline, units


def gated(model, places, values):
    """Logits with gates of these values."""
    gates = Gates([p for p in places if p.name in values], Plain(), dtype=torch.float64)
    with torch.no_grad():
        for name, theta in gates.theta.items():
            theta.copy_(values[name])
    with gates.attached(model):
        return logits(model, some_ids())


def random_gates(units, seed=0, low=0.2, high=1.3):
    g = torch.Generator().manual_seed(seed)
    return {u.name: low + (high - low) * torch.rand(u.count, generator=g, dtype=torch.float64) for u in units}


@pytest.mark.parametrize("name", MODELS)
def test_soft_gates_can_be_folded_into_weights(name):
    model, outline, units = open_model(name)
    assert len(units) >= outline.layers  # gpt2 has fused heads
    before, values = logits(model, some_ids()), random_gates(units)
    wanted = gated(model, [unit_place(u) for u in units], values)
    assert not torch.allclose(wanted, before)
    fold_units(model, units, {})
    assert torch.equal(logits(model, some_ids()), before)
    fold_units(model, units, values)
    torch.testing.assert_close(logits(model, some_ids()), wanted, rtol=1e-11, atol=1e-11)


def test_a_closed_gate_is_a_unit_that_is_not_there():
    model, outline, units = open_model("llama-gqa")
    values = {u.name: torch.ones(u.count, dtype=torch.float64) for u in units}
    head, channel = units[0], units[1]
    assert channel.kind == CHANNELS and head.kind == HEADS and head.count == 2
    values[channel.name][5] = 0
    values[head.name][1] = 0
    masked = gated(model, [unit_place(u) for u in units], values)
    with torch.no_grad():
        model.get_submodule(channel.name).weight[:, 5] = 0
        attention = model.model.layers[0].self_attn
        attention.o_proj.weight[:, 12:] = 0  # the second key-value head's two query heads of 6 dimensions
    torch.testing.assert_close(logits(model, some_ids()), masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "qwen2-bias", "mistral"])
def test_masked_dimensions_of_the_residual_stream_can_be_sliced_with_their_soft_values(name):
    model, outline, units = open_model(name)
    kept = torch.tensor([i for i in range(24) if i % 3])
    g = torch.Generator().manual_seed(3)
    gates = torch.zeros(24, dtype=torch.float64)
    gates[kept] = 0.3 + torch.rand(len(kept), generator=g, dtype=torch.float64)
    wanted = gated(model, [hidden_place(model, outline)], {HIDDEN: gates})
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    select_hidden(model, outline, kept, gates)
    assert torch.allclose(logits(model, some_ids()), wanted, rtol=0, atol=CLOSE * float(wanted.abs().max()))
    assert model.config.hidden_size == 16
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_all_dimensions_of_the_residual_stream_are_the_same_model():
    model, outline, _ = open_model("llama-tied")
    before = logits(model, some_ids())
    select_hidden(model, outline, torch.arange(24))
    assert torch.allclose(logits(model, some_ids()), before, rtol=0, atol=CLOSE * float(before.abs().max()))


def test_other_families_are_refused():
    model, outline, _ = open_model("gpt2-conv1d")
    assert not selectable(model)
    with pytest.raises(CorankError, match="llama"):
        select_hidden(model, outline, torch.arange(8))


def test_hidden_sizes_suit_the_number_of_heads():
    config = tiny("llama-gqa").config
    assert step_of(config) == 4
    config.hidden_size, config.num_attention_heads = 576, 9
    assert step_of(config) == 72
    config.hidden_size = 585
    assert step_of(config) == 9
