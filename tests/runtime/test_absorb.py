"""Which permutations of pivoted layers are free: the absorbed model is the model, without the gathers."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corank.factors import CURLinear, replace, weight_of
from corank.runtime import set_runtime
from corank.runtime.absorb import absorb, in_order, permute_columns, permute_rows
from factorized import compressed, factors_of
from tiny import tiny

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


class Gathers(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("index_select", "index")
        return func(*args, **(kwargs or {}))


def run(model):
    with torch.no_grad(), Gathers() as gathers:
        logits = model(input_ids=IDS).logits
    return logits, gathers.count


def one_block(name="llama-gqa", **kinds):
    """A model of one block in fp64; role -> kind of that matrix, the others dense."""
    model = tiny(name, dtype=torch.float64)
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    places = {"v": "self_attn.v_proj", "o": "self_attn.o_proj", "q": "self_attn.q_proj"}
    for role, kind in kinds.items():
        site = f"model.layers.0.{places.get(role, f'mlp.{role}_proj')}"
        layer = model.get_submodule(site)
        bias = None if layer.bias is None else layer.bias.detach()
        replace(model, site, factors_of(kind, weight_of(layer), {"v": 3}.get(role, 5)).module(bias))
    return model


def name_of(role):
    return f"model.layers.0.{'self_attn' if role in 'qkvo' else 'mlp'}.{role}_proj"


KINDS = ("dense", "low_rank", "cur", "row_pivoted", "column_pivoted")


@pytest.mark.parametrize("down", KINDS)
@pytest.mark.parametrize("up", KINDS)
def test_gate_is_free_whatever_its_neighbours_are(up, down):
    kinds = {"gate": "row_pivoted", "up": up, "down": down}
    model = one_block(**{role: kind for role, kind in kinds.items() if kind != "dense"})
    before, gathers = run(model)
    state = {k: v.shape for k, v in model.state_dict().items()}
    said = absorb(model)
    after, left = run(model)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert said[name_of("gate")] == "absorbed" and in_order(model.get_submodule(name_of("gate")))
    assert left == gathers - 1
    assert {k: v.shape for k, v in model.state_dict().items()} == state
    if up == "row_pivoted":
        assert said[name_of("up")] == "its sibling's permutation is another one"
    assert set(absorb(model).values()) <= {"in order already", *set(said.values()) - {"absorbed"}}


def test_with_the_same_pivots_both_are_free():
    model = one_block(gate="row_pivoted", up="row_pivoted")
    gate, up = (model.get_submodule(name_of(role)) for role in ("gate", "up"))
    up.pivots.copy_(gate.pivots)
    up.finalize()
    before, gathers = run(model)
    assert set(absorb(model).values()) == {"absorbed"}
    after, left = run(model)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert left == gathers - 2


@pytest.mark.parametrize("name,free", [("gemma", True), ("llama-gqa", False)])
def test_values_are_free_inside_a_head(name, free):
    model = one_block(name, v="row_pivoted", o="low_rank")
    before, gathers = run(model)
    said = absorb(model)
    after, left = run(model)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert (said[name_of("v")] == "absorbed") is free and gathers - left == free


def test_what_has_an_order_keeps_its_gather():
    model = one_block(q="row_pivoted", o="row_pivoted", down="row_pivoted")
    before, gathers = run(model)
    said = absorb(model)
    assert set(said.values()) == {"its outputs have an order that others rely on"} and len(said) == 3
    after, left = run(model)
    assert torch.equal(before, after) and left == gathers


def test_a_bias_moves_along_and_packed_models_too():
    model = compressed("row_pivoted", "gpt2-conv1d", ranks=(5, 4), dtype=torch.float64)
    before, gathers = run(model)
    set_runtime(model, "packed")
    said = absorb(model)
    assert said["transformer.h.0.mlp.c_fc"] == "absorbed" and said["transformer.h.0.mlp.c_proj"] != "absorbed"
    after, left = run(model)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert left == gathers - 1
    torch.testing.assert_close(run(set_runtime(model, "packed"))[0], before, rtol=1e-12, atol=1e-12)


def test_neighbours_that_cannot_be_permuted_are_named():
    model = one_block(gate="row_pivoted", up="low_rank", down="low_rank")
    down = model.get_submodule(name_of("down"))
    down.followed = True
    before, _ = run(model)
    assert absorb(model)[name_of("gate")] == "the next layer shares its basis with others"
    down.followed = False
    model.get_submodule(name_of("up")).up = torch.nn.Sequential(model.get_submodule(name_of("up")).up)
    assert "cannot be permuted" in absorb(model).get(name_of("gate"), "")
    assert torch.equal(run(model)[0], before)


@pytest.mark.parametrize("kind", ["low_rank", "cur", "row_pivoted", "column_pivoted"])
def test_rows_and_columns_of_every_kind(kind):
    W = torch.randn(9, 7, dtype=torch.float64)
    layer = factors_of(kind, W, 4).module(torch.randn(9))
    rows, columns = torch.randperm(9), torch.randperm(7)
    dense, bias = layer.dense_weight(), layer.bias.detach().clone()
    with torch.no_grad():
        permute_rows(layer, rows)
        permute_columns(layer, columns)
    torch.testing.assert_close(layer.dense_weight(), dense[rows][:, columns])
    torch.testing.assert_close(layer.bias.detach(), bias[rows])
    x = torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ dense[rows][:, columns].T + bias[rows])
    assert not isinstance(layer, CURLinear) or kind == "cur"
