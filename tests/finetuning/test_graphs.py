"""Every kind of layer and a whole model as one graph: compiled, exported, generating with a static cache."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from transformers import CompileConfig

from corank import checkpoint
from corank.factors import SharedBasis
from factorized import IDS, KINDS, compressed, factors_of, logits, mixed, tied_in_factors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
W = torch.randn(14, 11, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(14, generator=torch.Generator().manual_seed(1))


class Group(nn.Module):
    """Two layers on one basis."""

    def __init__(self) -> None:
        super().__init__()
        layers = SharedBasis(W[:4], {"a": W[:, :4], "b": W[:9, 3:7]}).modules({"a": BIAS})
        self.a, self.b = layers["a"], layers["b"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def layers():
    """Name -> layer: every kind at rank 0, in between and full, with and without a bias."""
    found = {
        f"{kind}-{k}-{bias}": factors_of(kind, W, k).module(BIAS if bias else None)
        for kind in KINDS
        for k, bias in ((0, True), (4, False), (4, True), (11, True))
    }
    return {**found, "shared": Group()}


LAYERS = layers()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_compiles_to_one_graph(name, backend):
    layer, x = LAYERS[name], torch.randn(3, 5, 11)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), layer(x))
    grads = []
    for f in (layer, compiled):  # training too
        x_ = x.clone().requires_grad_()
        f(x_).square().sum().backward()
        grads.append(x_.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_exports_whatever_the_number_of_tokens(name):
    layer = LAYERS[name]
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(7, 11),), dynamic_shapes=({0: tokens},), strict=True)
    x = torch.randn(13, 11)
    torch.testing.assert_close(program.module()(x), layer(x))


def conv1d():
    return compressed("low_rank", "gpt2-conv1d", ranks=(5, 3, 4))


def tied():
    """The embedding looks up the head's factors."""
    model = tied_in_factors()
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    return model


MODELS = {
    "mixed": lambda: mixed(layers=1),  # low rank, CUR, pivoted rows, a shared basis
    "column_pivoted": lambda: compressed("column_pivoted", ranks=(5, 3, 4)),
    "conv1d": conv1d,
    "tied": tied,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_compiles_exports_and_generates(name):
    model = MODELS[name]().eval()
    checkpoint.attach(model)  # as one that was loaded: transformers asks the quantizer whether it may compile
    due = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, due)
        program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(program.module()(IDS, use_cache=False).logits, due)
    generation = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(IDS, **generation)
    assert plain.shape[1] == IDS.shape[1] + 6
    assert torch.equal(plain, model.generate(IDS, cache_implementation="static", **generation))
    config = CompileConfig(fullgraph=True, backend="aot_eager")
    config._compile_all_devices = True  # on the CPU too
    once = model.generate(IDS, cache_implementation="static", compile_config=config, **generation)
    assert torch.equal(plain, once) and model._last_compile_config is config  # the steps really were compiled


@pytest.mark.skipif(shutil.which("cc") is None, reason="inductor needs a C compiler")
def test_inductor_gives_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    layers = nn.Sequential(*(factors_of(kind, torch.randn(11, 11), 4).module() for kind in KINDS))
    x = torch.randn(6, 11)
    torch.testing.assert_close(torch.compile(layers, fullgraph=True)(x), layers(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_factors_make_a_graph_as_well(scheme):
    pytest.importorskip("torchao")
    model = mixed(layers=1).eval()
    checkpoint.quantize_factors(model, scheme, group=4)
    due = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, due)
        program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(program.module()(IDS, use_cache=False).logits, due)
    plain = model.generate(IDS, max_new_tokens=4, do_sample=False)
    static = model.generate(IDS, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, static)
