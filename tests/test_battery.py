"""Every registered weight method meets the same oracles without anyone writing a test for it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import corank
from corank import recipe
from corank.budget import ALLOCATORS
from corank.engine.site import cost, factorize_site
from corank.factorize import Measured
from corank.model import Site, Text
from corank.statistics import ClippedGradientGram, FisherDiagonal, GradientGram, InputGram, InputMoments
from tiny import saved, text, tiny, tokenizer

METHODS = [m.name for m in recipe.methods(family="weights")]
SHAPES = {"square": (12, 12), "wide": (9, 17), "tall": (19, 10), "thin": (3, 14), "odd": (13, 7)}
TEXT = Text(text(), "words")
# few trials and steps: what they are for is tested in tests/probing
DATA = dict(data=TEXT, samples=6, length=16, batch=4, trials=6, steps=12)


def matrix(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    m, n = shape
    U, s, Vt = torch.linalg.svd(torch.randn(m, n, generator=g, dtype=torch.float64), full_matrices=False)
    return U * torch.arange(1, len(s) + 1, dtype=torch.float64) ** -0.7 @ Vt


def measured(shape, tokens=60, samples=4, seed=1, dead=(), method_affine=False):
    """All statistics of a site from correlated inputs and random output gradients."""
    m, n = shape
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64)
    X = torch.randn(samples, max(tokens // samples, 1), n, generator=g, dtype=torch.float64) @ mix + 0.5
    X[..., list(dead)] = 0
    dY = torch.randn(*X.shape[:2], m, generator=g, dtype=torch.float64)
    statistics = {
        "gram": InputGram(n),
        "moments": InputMoments(n),
        "fisher": FisherDiagonal(m, n),
        "gradient": GradientGram(m),
        "clipped-gradient": ClippedGradientGram(m),
    }
    statistics["gram"].update(X)
    statistics["moments"].update(X)
    statistics["fisher"].update(X, dY)
    statistics["gradient"].update(dY)
    statistics["clipped-gradient"].update(dY)
    return Measured({k: s.result() for k, s in statistics.items()}, {}, method_affine), X.flatten(0, 1)


def site(shape, bias=False):
    return Site("model.layers.0.x", "q", 0, shape, "model.layers.0.x", bias)


def replacement(name, shape, rank, seed=0, data=None, bias=None, **settings):
    made = recipe.get(name).recipe(**settings)
    data = data if data is not None else measured(shape, method_affine=made.affine)[0]
    return factorize_site(
        made, site(shape, bias is not None), matrix(shape), bias, data, rank, seed=seed, dtype=torch.float64
    )


def packing(name):
    return [False, True] if recipe.get(name).recipe().factorize.kind in ("low_rank", "cur") else [False]


CASES = [(n, s, p) for n in METHODS for s in SHAPES for p in packing(n)]


@pytest.mark.parametrize("name,shape,pack", CASES)
def test_full_rank_is_lossless(name, shape, pack):
    W = matrix(SHAPES[shape])
    r = replacement(name, SHAPES[shape], min(SHAPES[shape]), pack=pack)
    torch.testing.assert_close(r.module.dense_weight(), W, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name,shape,pack", CASES)
def test_predicted_loss_is_the_realised_loss(name, shape, pack):
    made = recipe.get(name).recipe(pack=pack)
    data, X = measured(SHAPES[shape], method_affine=made.affine)
    W = matrix(SHAPES[shape])
    for rank in (1, min(SHAPES[shape]) // 2):
        r = replacement(name, SHAPES[shape], rank, data=data, pack=pack)
        assert r.row["loss"] == pytest.approx(r.row["predicted_loss"], rel=1e-6, abs=1e-7)
        geometry = made.geometry(data)
        if geometry.right.G is not None and geometry.right.G.ndim == 2 and geometry.R is None and not made.affine:
            E = (W - r.module.dense_weight()) @ X.T  # the loss is that of the outputs on the data themselves
            assert math.sqrt(geometry.loss(W - r.module.dense_weight())) == pytest.approx(
                float(torch.linalg.norm(E)) / math.sqrt(len(X)), rel=1e-8
            )


@pytest.mark.parametrize("name", METHODS)
def test_with_an_output_metric_the_change_of_the_loss_is_predicted_in_nats(name):
    data, _ = measured(SHAPES["wide"], method_affine=recipe.get(name).recipe().affine)
    geometry = recipe.get(name).recipe().geometry(data)
    r = replacement(name, SHAPES["wide"], 4, data=data)
    if geometry.R is None:
        assert "predicted_nats" not in r.row
    else:
        error = matrix(SHAPES["wide"]) - r.module.dense_weight()
        assert r.row["predicted_nats"] == pytest.approx(geometry.loss(error) / 2, rel=1e-8)


# a sketch of another width selects otherwise, and so does a randomized SVD: their own curves are checked above
NESTED = [
    n
    for n in METHODS
    if getattr(recipe.get(n).recipe().factorize, "selector", "") != "sketch"
    and getattr(recipe.get(n).recipe().factorize, "svd", "exact") == "exact"
]


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_curve_is_what_factorizing_gives_at_every_rank_it_names(name, shape):
    """Nested selections: the curve of one decomposition at full rank against factorizations at each rank."""
    made = recipe.get(name).recipe()
    data, _ = measured(SHAPES[shape], method_affine=made.affine)
    W, geometry = matrix(SHAPES[shape]), made.geometry(data)
    curve = made.factorize.curve(W, geometry, torch.Generator().manual_seed(0))
    assert len(curve) == min(SHAPES[shape]) + 1
    assert float(curve[0]) == pytest.approx(geometry.loss(W), rel=1e-9)
    for rank in range(1, min(SHAPES[shape])):
        found = made.factorize.factorize(W, geometry, rank, torch.Generator().manual_seed(0)).predicted
        assert found == pytest.approx(float(curve[rank]), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", ["one token", "few tokens", "dead channels", "constant input"])
def test_singular_statistics_are_a_normal_case(name, case):
    shape = SHAPES["wide"]
    made = recipe.get(name).recipe()
    tokens = {"one token": 1, "few tokens": 5}.get(case, 60)
    data, X = measured(shape, tokens, 1, dead=(0, 3) if case == "dead channels" else (), method_affine=made.affine)
    if case == "constant input":
        gram = InputGram(shape[1])
        gram.update(torch.ones(1, 30, shape[1], dtype=torch.float64))
        data = Measured({**data._results, "gram": gram.result()}, {}, made.affine)
    r = replacement(name, shape, 4, data=data)
    assert torch.isfinite(r.module.dense_weight()).all() and math.isfinite(r.row["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_factors(name):
    a, b = (replacement(name, SHAPES["tall"], 4, seed=7) for _ in range(2))
    assert torch.equal(a.module.dense_weight(), b.module.dense_weight())


@pytest.mark.parametrize("name", METHODS)
def test_the_bias_is_kept_or_shifted_so_that_the_mean_output_is_right(name):
    shape = SHAPES["tall"]
    made = recipe.get(name).recipe()
    bias = torch.arange(shape[0], dtype=torch.float64)
    data, X = measured(shape, method_affine=made.affine)
    r = replacement(name, shape, 3, data=data, bias=bias)
    if not made.affine:
        assert torch.equal(r.module.bias.detach(), bias)
        return
    dense = X @ matrix(shape).T + bias
    torch.testing.assert_close(r.module(X).detach().mean(0), dense.mean(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [0.9, 0.75])
@pytest.mark.parametrize("model_name", ["llama-gqa", "gpt2-conv1d", "qwen2-bias"])
def test_the_budget_is_met_and_never_exceeded(name, keep, model_name):
    model = tiny(model_name)
    before = {n: m for n, m in model.named_modules()}
    try:
        report = corank.compress(model, name, keep=keep, tokenizer=tokenizer(), **DATA)
    except corank.CorankError as error:
        assert "no less than" in str(error)  # curing: some roles only
        return
    sites = report.accounting["sites"]
    assert sites["compressed"] <= keep * sites["dense"]
    stored = gone = 0
    for row in report.sites:
        module, old = model.get_submodule(row["name"]), before[row["name"]].bias
        bias = 0 if module.bias is None else module.bias.numel()
        if row["kind"] == "dense" and row["params"] == row["params_dense"]:
            assert module is before[row["name"]]
        tensors = [t for t in module.state_dict(keep_vars=True).values() if t.numel()]
        stored += sum(t.numel() for t in tensors) - (0 if old is None else bias)
        gone += 0 if old is None else old.numel() - bias  # rows of a narrower matrix take their biases along
    assert stored == sites["compressed"]  # indices and added biases counted
    dense = report.accounting["model"]["dense"]
    assert report.accounting["model"]["compressed"] == dense - sites["dense"] + stored - gone


@pytest.mark.parametrize("name", METHODS)
def test_save_load_dense_equal(name, tmp_path):
    folder = saved("qwen2-bias", tmp_path / "dense")
    settings = {"layers": 1, "rank": 3} if name == "curing" else {"layers": 1} if name == "curing-v2" else {"keep": 0.7}
    corank.compress(folder, name, out=tmp_path / "small", **settings, **DATA)
    corank.verify(tmp_path / "small")
    model, _ = corank.load(tmp_path / "small")
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        dense = corank.dequantize(model)
        torch.testing.assert_close(dense(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert getattr(dense.config, "quantization_config", None) is None


@pytest.mark.parametrize("name", METHODS)
def test_any_allocator_works_with_every_method(name):
    model = tiny("llama-gqa")
    report = corank.compress(model, name, keep=0.8, allocate="lagrange", tokenizer=tokenizer(), **DATA)
    sites = report.accounting["sites"]
    assert 0.7 * sites["dense"] <= sites["compressed"] <= 0.8 * sites["dense"]


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("name", ["best", "col-id"])
def test_every_allocator_works(name, allocator):
    model = tiny("qwen2-bias")
    if name == "col-id" and allocator in ("zs-svd", "ara", "dobi-svd", "acip"):  # columns are no components
        with pytest.raises(corank.CorankError, match="weighs the components of a truncation"):
            corank.compress(model, name, keep=0.7, allocate=allocator, tokenizer=tokenizer(), **DATA)
        return
    report = corank.compress(model, name, keep=0.7, allocate=allocator, tokenizer=tokenizer(), **DATA)
    sites = report.accounting["sites"]
    assert 0.6 * sites["dense"] <= sites["compressed"] <= 0.7 * sites["dense"]
    assert report.predicted_increase is None if name == "col-id" else report.predicted_increase > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_documents_its_parameters(name):
    method = recipe.get(name)
    assert method.cite and method.summary.endswith(".")
    for parameter in method.parameters:
        assert f"{parameter}:" in method.doc


def test_costs_come_from_the_factor_kinds():
    for name in METHODS:
        made = recipe.get(name).recipe()
        r = replacement(name, SHAPES["wide"], 3)
        extra = SHAPES["wide"][0] if made.affine else 0
        assert r.factors.numel + extra == cost(made, site(SHAPES["wide"]), 3) == r.row["params"]
        assert dataclasses.is_dataclass(made)
