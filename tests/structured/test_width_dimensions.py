"""Fewer dimensions in every head: the best basis for values and outputs, the best pairs for queries and keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as tf
from width_blocks import block_of, llama

from corank.linalg.roots import psd_sqrt
from corank.model import outline
from corank.structured.dimensions import output_energy, pair_rows, pair_scores, value_output
from corank.structured.moments import Moments
from corank.structured.narrow import narrow, scores
from corank.structured.recipe import Structured
from corank.structured.rotation import frequencies, keep_pairs, with_pairs
from corank.structured.shape import narrowed_config
from corank.structured.units import PAIRS

RECIPE = Structured(units=("channels", "qk", "vo"), score="leverage", compensate="ls", statistics=("gram",))
IDS = torch.tensor([[5, 9, 17, 33, 60, 7, 8, 21, 40, 41, 3, 11]])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_query_key_scores_need_channel_energies_alone():
    X = randn(16, 300, seed=1) + 0.5
    W_Q, W_K, b = randn(6, 16, seed=2), randn(6, 16, seed=3), randn(6, seed=4)
    inputs = Moments(X @ X.T / 300, X.mean(1), 300)
    Q, K = W_Q @ X + b[:, None], W_K @ X
    energies = output_energy(W_Q, b, inputs), output_energy(W_K, None, inputs)
    assert torch.allclose(energies[0], Q.square().mean(1)) and torch.allclose(energies[1], K.square().mean(1))
    roots = psd_sqrt(Q @ Q.T / 300), psd_sqrt(K @ K.T / 300)
    by_definition = roots[0].norm(dim=0) * roots[1].norm(dim=0)
    assert torch.allclose((energies[0] * energies[1]).sqrt(), by_definition, rtol=1e-10)


def test_pairs_of_a_group_add_up_and_do_not_depend_on_the_position():
    q, k = randn(2 * 2 * 6, seed=5).abs(), randn(2 * 6, seed=6).abs()
    found = pair_scores(q, k, 6)
    for b in range(2):
        for i in range(3):
            keys = k[b * 6 + i] + k[b * 6 + i + 3]
            queries = sum(q[(b * 2 + a) * 6 + i] + q[(b * 2 + a) * 6 + i + 3] for a in range(2))
            assert float(found[b, i]) == pytest.approx(float(keys * queries))
    assert pair_rows(torch.tensor([0, 2]), 2, 6).tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    angle = torch.tensor(0.7, dtype=torch.float64)
    Z = randn(2, 100, seed=7)
    turned = torch.stack([Z[0] * angle.cos() - Z[1] * angle.sin(), Z[1] * angle.cos() + Z[0] * angle.sin()])
    assert float(Z.square().sum()) == pytest.approx(float(turned.square().sum()))


@pytest.mark.parametrize("r", [1, 3, 5, 6])
def test_values_and_outputs_lose_the_discarded_energy_and_never_more_than_one_sided(r):
    d, g, h, T = 12, 2, 6, 500
    X = randn(d, d, seed=8) @ randn(d, T, seed=9)
    W_V, W_O = randn(h, d, seed=10), randn(g * d, h, seed=11)
    V = W_V @ X
    E, B, S2 = value_output(W_O, V @ V.T / T, r)
    loss = float((W_O @ V - W_O @ B @ E @ V).square().sum())
    assert loss == pytest.approx(T * float(S2[r:].sum()), rel=1e-9, abs=1e-9 * float((W_O @ V).square().sum()))
    assert torch.allclose(E @ B, torch.eye(r, dtype=torch.float64), atol=1e-9)
    best = torch.linalg.svdvals(W_O @ V)[r:].square().sum()
    assert loss == pytest.approx(float(best), rel=1e-8, abs=1e-8 * float(S2.sum() * T))
    U = torch.linalg.svd(V).U[:, :r]  # looking at the values alone
    assert loss <= float((W_O @ V - W_O @ U @ U.T @ V).square().sum()) * (1 + 1e-12) + 1e-9


def test_white_values_give_the_plain_decomposition():
    d, h, r = 12, 6, 4
    W_V, W_O = randn(h, d, seed=12), randn(d, h, seed=13)
    E, B, S2 = value_output(W_O, W_V @ W_V.T, r)
    U, S, Vh = torch.linalg.svd(W_O @ W_V)
    assert torch.allclose((W_O @ B) @ (E @ W_V), U[:, :r] * S[:r] @ Vh[:r], atol=1e-9)
    assert torch.allclose(S2, S[:h].square())


def test_values_that_span_less_than_what_stays():
    V, W_O = randn(6, 2, seed=14) @ randn(2, 50, seed=15), randn(12, 6, seed=16)
    E, B, S2 = value_output(W_O, V @ V.T / 50, 4)
    assert E.shape == (4, 6) and torch.allclose(W_O @ B @ (E @ V), W_O @ V, atol=1e-8) and float(S2[2:].sum()) < 1e-9


def narrowed(model, pairs):
    """All blocks of a model with heads of some pairs; its rotary embeddings too."""
    blocks = [block_of(model, RECIPE, layer) for layer in range(3)]
    for block in blocks:
        narrow(block, dataclasses.replace(block.shape, head_dim=2 * len(pairs), pairs=pairs))
    keep_pairs(model, 6, pairs)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("bias", [False, True])
def test_dead_dimensions_go_without_a_trace_and_a_plain_configuration_says_so(bias):
    model = llama(attention_bias=bias)
    dead = torch.tensor([0, 3, 6, 9])  # pair 0 of both key-value heads, and two of the dimensions of values
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[dead] = 0.0
                if bias:
                    projection.bias[dead] = 0.0
    before = logits(model)
    config = model.config
    narrowed(model, (1, 2))
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (8, 24)
    assert model.model.layers[0].self_attn.o_proj.weight.shape == (24, 16)
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-8 * float(before.abs().max()))
    plain = tf.LlamaForCausalLM(with_pairs(config, 6, (1, 2))).double().eval()
    plain.load_state_dict(model.state_dict())
    # frequencies of a configuration are float32
    assert torch.allclose(logits(plain), before, rtol=0, atol=1e-4 * float(before.abs().max()))


def test_attention_stays_divided_by_the_root_of_the_original_size():
    model = llama()
    first = model.model.layers[0].self_attn
    q = first.q_proj.weight.detach().clone()
    narrowed(model, (0, 2))
    rows = pair_rows(torch.tensor([0, 2]), 4, 6)
    scale = first.scaling / 6**-0.5
    assert torch.allclose(first.q_proj.weight * scale, q[rows], atol=1e-12) and first.scaling == 4**-0.5


def test_all_pairs_are_the_same_frequencies():
    for rope in (
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    ):
        config = llama(rope_parameters=rope).config
        same = with_pairs(config, 6, (0, 1, 2))
        built = tf.LlamaForCausalLM(same).model.rotary_emb.inv_freq
        dense = tf.LlamaForCausalLM(config).model.rotary_emb.inv_freq
        assert torch.allclose(built, dense, rtol=1e-6) and torch.allclose(frequencies(config, 6).float(), dense)
        part = tf.LlamaForCausalLM(with_pairs(config, 6, (0, 2)))
        assert torch.allclose(part.model.rotary_emb.inv_freq, dense[[0, 2]], rtol=1e-6)
        long = torch.arange(200)[None]  # beyond what the model was made for
        assert torch.allclose(
            part.model.rotary_emb(torch.zeros(1), long)[0][..., :2],
            tf.LlamaForCausalLM(config).model.rotary_emb(torch.zeros(1), long)[0][..., [0, 2]],
            atol=1e-4,
        )


def test_scores_of_pairs_are_those_of_the_block():
    found = scores(block_of(llama(), RECIPE))[PAIRS]
    assert found.shape == (3,) and (found > 0).all()
    model = llama()
    plan = outline(model.config, type(model))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[[1, 4, 7, 10]] = 0.0
    assert float(scores(block_of(model, RECIPE))[PAIRS][1]) == 0.0 and plan.layers == 3
    assert narrowed_config(model.config, block_of(model, RECIPE).shape).head_dim == 6


@torch.no_grad()
def test_outputs_are_fitted_to_the_mixtures_of_values_that_they_read():
    """No W_O' of the same shape, behind the same values, loses less than the one that is stored."""
    lost = {}
    for how in ("none", "ls"):
        model = llama()
        block = block_of(model, dataclasses.replace(RECIPE, compensate=how, sequential=False))
        seen = {}
        block.observe({"self_attn.o_proj": lambda x, mask, seen=seen: seen.update(z=x.flatten(0, -2))})
        W_V, W_O = (getattr(block.module.self_attn, f"{name}_proj").weight.clone() for name in "vo")
        made = narrow(block, dataclasses.replace(block.shape, head_dim=4, pairs=(0, 1)))
        new_V, new_O = (getattr(block.module.self_attn, f"{name}_proj").weight for name in "vo")
        # values are linear in the input, so the encoder of a head is that of its rows
        encoders = [
            torch.linalg.lstsq(W_V[a * 6 : a * 6 + 6].T, new_V[a * 4 : a * 4 + 4].T).solution.T for a in (0, 0, 1, 1)
        ]
        coded = seen["z"] @ torch.block_diag(*encoders).T
        wanted = seen["z"] @ W_O.T
        lost[how] = float((wanted - coded @ new_O.T).norm() / wanted.norm())
        best = torch.linalg.lstsq(coded, wanted).solution.T
        if how == "ls":
            assert torch.allclose(new_O, best, atol=1e-6)
            assert made.losses["model.layers.0.self_attn.o_proj"] == pytest.approx(lost[how], rel=1e-6)
    assert lost["ls"] < lost["none"]
