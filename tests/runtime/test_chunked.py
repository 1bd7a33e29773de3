"""Chunks of tokens: the same bits, less memory, every MLP that is one, and nothing else touched."""

from __future__ import annotations

import copy

import pytest
import torch
from runtime_models import MODELS, GatedMLP, close, outputs
from torch import nn

from corank.errors import CorankError
from corank.runtime import overrides, peak_activation, runtime_of, set_runtime
from corank.runtime.forms import form_of
from corank.runtime.mlp import MLP, chunk_size, mlps, spans
from corank.runtime.override import install
from tiny import tiny


def with_chunk(model, size):
    for override in overrides(model):
        override.chunk = size


@pytest.mark.parametrize("name", MODELS)
def test_any_chunk_gives_the_same_logits(name):
    model = MODELS[name]()
    expected = outputs(model)
    set_runtime(model, "chunked")
    found = list(overrides(model))
    assert len(found) == (0 if name == "opt" else model.config.num_hidden_layers)
    for size in (1, 7, 39, 40, None):
        with_chunk(model, size)
        close(outputs(model), expected)
    set_runtime(model, "torch")
    assert not list(overrides(model)) and runtime_of(model) == "torch"
    restored = outputs(model)
    assert all(torch.equal(restored[key], expected[key]) for key in expected)


def test_chunks_that_the_library_computes_alike_are_the_same_bits():
    mlp, x = GatedMLP(256, 1024, (96, 80, 64)), torch.randn(2, 512, 256)
    with torch.no_grad():
        expected = mlp(x)
        for size in (128, 512, 1024, 1025):
            mlp.forward = MLP(mlp, form_of(mlp), size)
            assert torch.equal(mlp(x), expected), size
            del mlp.forward


@pytest.mark.parametrize("size,saved", [(512, 0.69), (128, 0.81)])
def test_the_peak_falls_by_what_the_intermediate_took(size, saved):
    mlp, x = GatedMLP(256, 1024, (96, 96, 96)), torch.randn(1, 2048, 256)
    with torch.no_grad():
        plain = peak_activation(lambda: mlp(x))
        install(MLP(mlp, form_of(mlp), size))
        peak = peak_activation(lambda: mlp(x))
    # three activations [T, D] of the gated product at the same time, in fp32
    assert plain == 3 * 2048 * 1024 * 4
    assert peak <= (1 - saved) * plain


def test_a_model_needs_less_memory():
    model = MODELS["low_rank"]()
    ids = torch.randint(3, 60, (8, 60))
    with torch.no_grad():
        plain = peak_activation(lambda: model.model(input_ids=ids))
        set_runtime(model, "chunked")
        with_chunk(model, 32)
        assert peak_activation(lambda: model.model(input_ids=ids)) < plain


def test_learning_takes_the_plain_way():
    model, ids = MODELS["low_rank"](), torch.randint(3, 60, (2, 9))
    grads = []
    for runtime in ("torch", "chunked"):
        set_runtime(model, runtime)
        with_chunk(model, 3)
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_copy_computes_with_its_own_weights():
    model = set_runtime(MODELS["low_rank"](), "chunked")
    twin = copy.deepcopy(model)
    expected = outputs(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(v.abs().max() == 0 for v in outputs(twin).values())
    close(outputs(model), expected, 0.0)
    set_runtime(twin, "torch")
    assert list(overrides(model)) and not list(overrides(twin))


def test_what_only_looks_like_an_mlp_is_left_alone():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(6, 12), nn.Linear(12, 6), nn.GELU()

        def forward(self, x):
            return self.b(self.act(self.a(x))) + x.mean(dim=-2, keepdim=True)

    class Clamped(Mixing):
        def forward(self, x):
            return self.b(self.act(self.a(x)).clamp(max=7))

    class Biased(Mixing):
        def forward(self, x):
            return self.b(self.act(self.a(x))) + 1

    assert mlps(Mixing().eval()) == []
    for other in (Clamped(), Biased()):
        (override,) = mlps(other.eval(), 2)
        assert not isinstance(override, MLP)  # its own forward, chunk by chunk
        install(override)
        x = torch.randn(3, 3, 6)
        with torch.no_grad():
            torch.testing.assert_close(other(x), type(other).forward(other, x))


def test_hooks_and_adapters_inside_still_work():
    model = set_runtime(MODELS["low_rank"](), "chunked")
    with_chunk(model, 5)
    seen = []
    handle = model.model.layers[0].mlp.gate_proj.down.register_forward_hook(lambda m, a, y: seen.append(len(y)))
    outputs(model)
    handle.remove()
    assert sum(seen) == 1 + 3 * 39 and max(seen) <= 5


def test_empty_and_strided_inputs():
    mlp = GatedMLP(6, 9, (2, 0, 3), bias=True)
    install(MLP(mlp, form_of(mlp), 2))
    x = torch.randn(4, 6, 5).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), type(mlp).forward(mlp, x))
        assert mlp(x[:, :0]).shape == (4, 0, 6)
        assert mlp(x[0, 0]).shape == (6,)


def test_chunks_are_of_nearly_one_size():
    for tokens in (0, 1, 5, 512, 513, 1025):
        for chunk in (1, 2, 512):
            parts = spans(tokens, chunk)
            sizes = [b - a for a, b in parts]
            assert parts[0][0] == 0 and parts[-1][1] == tokens and sum(sizes) == tokens
            assert max(sizes) <= chunk and max(sizes) - min(sizes) <= 1
    assert chunk_size(14336, 2, torch.device("cuda")) == 2304
    assert chunk_size(10**9, 4, torch.device("cpu")) == 128


def test_calls_of_another_form_go_to_the_module():
    class Scaled(GatedMLP):
        def forward(self, x, scale=1.0):
            return scale * super().forward(x)

    mlp = set_runtime(Scaled(6, 9, (2, 3, 3)), "chunked")
    (override,) = overrides(mlp)
    override.chunk = 1
    x = torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, scale=2.0), 2 * mlp(x))
        torch.testing.assert_close(mlp(x=x), mlp(x))
        torch.testing.assert_close(mlp(x, 3.0), 3 * mlp(x))


def test_an_unknown_runtime_is_a_sentence():
    with pytest.raises(CorankError, match="nearest: chunked"):
        set_runtime(tiny("bert"), "chunk")
