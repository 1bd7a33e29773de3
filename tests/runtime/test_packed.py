"""Packed factors: fewer products, the same numbers, and parameters that may be changed, moved and saved as before."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from runtime_models import MODELS, GatedMLP, Products, batches, close, outputs

from corank.factors import LowRank, SharedLowRankLinear, replace
from corank.runtime import overrides, set_runtime
from corank.runtime.mlp import MLP
from corank.runtime.packed import Family, Head
from corank.runtime.packing import Siblings, Stack
from factorized import compressed, stir


def packed(model, grouped=None, chunk=None):
    return set_runtime(model, "packed", grouped=grouped, chunk=chunk)


def restored(model, expected):
    set_runtime(model, "torch")
    assert not list(overrides(model))
    for name, p in model.named_parameters():
        if p.numel():
            assert p.untyped_storage().nbytes() == p.nbytes, name
    found = outputs(model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_and_architecture_gives_the_same_logits(name, grouped):
    model = MODELS[name]()
    expected, state = outputs(model), {k: v.clone() for k, v in model.state_dict().items()}
    packed(model, grouped, chunk=7)
    close(outputs(model), expected)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    with torch.inference_mode():
        close(outputs(model), expected)
    restored(model, expected)


def products(model, runtime) -> float:
    runtime(model)
    with torch.no_grad(), Products() as counter:
        model.model(input_ids=torch.tensor([[5, 6, 7]]))
    # 2 of each layer's products are the scores and values of attention, or none where they are fused
    return counter.count


def test_seven_products_a_layer_where_sizes_allow_it():
    layers = 2
    model = compressed("low_rank", "llama-tied", ranks=(4,), layers=layers)
    plain = products(model, lambda m: set_runtime(m, "torch"))
    assert plain >= 14 * layers
    other = plain - 14 * layers
    set_runtime(model, "packed")
    assert products(model, lambda m: None) == 11 * layers + other
    set_runtime(model, "torch")
    assert products(model, lambda m: packed(m, grouped=True)) == 8 * layers + other
    shared = compressed("shared", layers=layers)
    before = products(shared, lambda m: set_runtime(m, "torch"))
    # qkv: 6 -> 2 and gate, up: 4 -> 2, with o and down dense
    assert before - products(shared, lambda m: packed(m, grouped=True)) == 6 * layers


@pytest.mark.parametrize("grouped", [False, True])
def test_changes_of_the_parameters_are_seen(grouped):
    model = packed(compressed("low_rank", "qwen2-bias", ranks=(5, 4, 4), layers=2), grouped)
    plain = lambda: outputs(set_runtime(copy.deepcopy(model), "torch"))  # noqa: E731
    outputs(model)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):  # in place
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.1)
    close(outputs(model), plain())
    other = compressed("low_rank", "qwen2-bias", ranks=(5, 4, 4), layers=2)
    stir_all(other)
    model.load_state_dict(other.state_dict())
    close(outputs(model), outputs(other))
    stir_all(other, 1)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    close(outputs(model), outputs(other))
    model.to(torch.float64)
    close(outputs(model), outputs(other.to(torch.float64)), 1e-12)
    model.to(torch.bfloat16)
    close(outputs(model), outputs(other.to(torch.bfloat16)), 0.06)
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(other.state_dict())
    for buffer, kept in zip(model.buffers(), other.buffers(), strict=True):  # the frequencies of the positions
        buffer.copy_(kept)
    close(outputs(model), outputs(other), 0.06)


def stir_all(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p.dtype))


def test_saving_twice_gives_the_same_bytes_as_without_packing(tmp_path):
    model = compressed("low_rank", layers=2)
    model.save_pretrained(tmp_path / "plain")
    packed(model, grouped=True)
    outputs(model)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "one", "two")]
    assert files[0] == files[1] == files[2]


def test_adapters_take_over_and_merge_back():
    from peft import LoraConfig, get_peft_model

    model = packed(compressed("low_rank", layers=2, ranks=(5, 4)), grouped=True)
    outputs(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down", "up"], init_lora_weights=False))
    stir(adapted)
    with_adapter = outputs(adapted)
    merged = adapted.merge_and_unload()
    close(outputs(merged), with_adapter, 1e-5)
    assert list(overrides(merged))
    close(outputs(merged), outputs(set_runtime(merged, "torch")), 1e-5)


def test_a_hook_on_a_factor_is_not_passed_over():
    model = packed(compressed("low_rank", layers=1))
    outputs(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for layer in (attention.k_proj.down, attention.k_proj, mlp.up_proj.down, mlp.gate_proj):
        seen = []
        handle = layer.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y.shape))
        outputs(model)
        handle.remove()
        assert len(seen) == len(batches())


def test_the_copy_of_a_packed_model_stands_on_its_own():
    model = packed(compressed("low_rank", layers=2), grouped=True)
    expected = outputs(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(outputs(twin), expected, 0.0)
        for p in twin.parameters():
            p.data.zero_()
        assert all(v.abs().max() == 0 for v in outputs(twin).values())
        close(outputs(model), expected, 0.0)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer).keys() == model.state_dict().keys()


def test_a_packed_model_compiles_to_one_graph_and_computes_plainly_there():
    torch._dynamo.reset()
    model = packed(compressed("low_rank", layers=1))
    expected = outputs(model)["batch"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = compiled(**batches()["batch"]).logits.flatten(0, 1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_members_of_a_family_are_told_from_strangers():
    layers = [LowRank(torch.randn(6, 3), torch.randn(3, 5)).module() for _ in range(3)]
    family = Family(Siblings(layers))
    for i, layer in enumerate(layers):
        layer.forward = Head(layer, i, family)
    plain = [type(layer).forward for layer in layers]
    x, other = torch.randn(4, 5), torch.randn(4, 5)
    with torch.no_grad():
        for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0), (0, 0, 0, 2, 1)):
            x = x.clone()
            for i in order:
                torch.testing.assert_close(layers[i](x), plain[i](layers[i], x))
        # another tensor in between, and the tensor changed in place
        layers[0](x)
        torch.testing.assert_close(layers[1](other), plain[1](layers[1], other))
        x.mul_(2)
        torch.testing.assert_close(layers[1](x), plain[1](layers[1], x))
        # called with different tensors each time, they stop computing ahead
        for _ in range(6):
            for i, layer in enumerate(layers):
                y = torch.randn(4, 5)
                torch.testing.assert_close(layer(y), plain[i](layer, y))
    assert family._in_vain()
    fresh = torch.randn(4, 5)
    with torch.no_grad():
        layers[0](fresh)
    assert not vars(fresh)


def test_a_stack_is_a_view_of_its_parts():
    layers = [torch.nn.Linear(5, m) for m in (3, 0, 4)]
    before = [layer.weight.detach().clone() for layer in layers]
    stack = Stack(layers)
    whole = stack.weight()
    assert torch.equal(whole, torch.cat(before)) and stack.weight() is whole
    with torch.no_grad():
        layers[2].weight.fill_(7)
    assert (whole[3:] == 7).all()
    layers[0].weight.data = torch.ones(3, 5)
    assert stack.weight() is not whole and (stack.weight()[:3] == 1).all()
    layers[0].to(torch.float64)
    assert stack.weight() is None


def test_copies_that_share_their_parameters_share_the_stack():
    layers = [torch.nn.Linear(5, m, bias=False) for m in (3, 4)]
    one, two = Stack(layers), Stack(layers)
    a, b = one.weight(), two.weight()
    assert a.data_ptr() == b.data_ptr() and torch.equal(a, b)
    assert one.weight() is a and two.weight() is b  # neither has moved what the other found
    one.release()
    assert torch.equal(two.weight(), b) and two.weight() is not b
    assert torch.equal(two.weight(), torch.cat([layer.weight for layer in layers]))


def test_basis_in_another_block_is_left_where_it_is(caplog):
    model = MODELS["across"]()
    expected = outputs(model)
    with caplog.at_level(logging.DEBUG, "corank.runtime"):
        packed(model)
    close(outputs(model), expected)
    for override in overrides(model):
        assert not (isinstance(override, Head) and isinstance(override.module, SharedLowRankLinear))


def test_mlp_with_biases_rank_zero_and_odd_ranks():
    for ranks in ((3, 3, 2), (0, 4, 1), (5, 0, 0), (2, 7, 3)):
        for bias in (False, True):
            mlp = GatedMLP(6, 11, ranks, bias)
            x = torch.randn(2, 5, 6)
            for grouped in (False, True):
                packed(mlp, grouped, chunk=4)
                assert [(type(o), o.ways) for o in overrides(mlp)] == [(MLP, ("packed", "plain"))]
                with torch.no_grad():
                    torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x))
                set_runtime(mlp, "torch")


def test_a_layer_put_in_later_is_used():
    model = packed(compressed("low_rank", layers=1))
    outputs(model)
    old = model.model.layers[0].mlp.gate_proj
    replace(model, "model.layers.0.mlp.gate_proj", LowRank(torch.randn(37, 2), torch.randn(2, 24)).module())
    after = outputs(model)
    close(after, outputs(set_runtime(model, "torch")))
    assert model.model.layers[0].mlp.gate_proj is not old
