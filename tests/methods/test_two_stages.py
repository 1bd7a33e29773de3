"""The rest of the family: residual stages, last layers only, feature mimicking of layers and embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import corank
from corank import recipe
from corank.errors import CorankError
from corank.factorize import Geometry, Measured, Metric, TwoStage
from corank.model import Site
from corank.recipe import RankChoice
from corank.statistics import InputGram
from tiny import text, tiny, tokenizer

TEXT = corank.model.Text(text(), "words")
DATA = dict(data=TEXT, samples=6, length=16, batch=4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(n: int, tokens: int = 60, mean: float = 0.0, affine: bool = False) -> tuple[Measured, Tensor]:
    X = randn(tokens, n, seed=1) @ randn(n, n, seed=2) + mean
    gram = InputGram(n)
    gram.update(X[None])
    return Measured({"gram": gram.result()}, {}, affine), X


def dense(name: str, W: Tensor, data: Measured, rank: int, **settings) -> Tensor:
    made = recipe.get(name).recipe(**settings)
    return made.factorize.factorize(W, made.geometry(data), rank, torch.Generator()).factors.dense()


SHAPES = [(11, 8), (8, 11), (9, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_two_stages_in_one_metric_are_one(shape, share):
    W, (data, _) = randn(*shape), measured(shape[1])
    for rank in (1, 4, 7):
        found = dense("ressvd", W, data, rank, share=share, second="data")
        torch.testing.assert_close(found, dense("svd-llm", W, data, rank), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ends_of_the_share_are_svd_llm_and_plain_svd(shape):
    W, (data, _) = randn(*shape), measured(shape[1])
    for name in ("nsvd", "ressvd"):
        torch.testing.assert_close(
            dense(name, W, data, 4, share=1.0), dense("svd-llm", W, data, 4), rtol=1e-9, atol=1e-10
        )
        torch.testing.assert_close(dense(name, W, data, 4, share=0.0), dense("svd", W, data, 4), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dense("nsvd", W, data, 5, share=0.6), dense("ressvd", W, data, 5, share=0.6))


@pytest.mark.parametrize("shape", SHAPES)
def test_nsvd_is_a_truncation_of_what_the_first_left(shape):
    W, (data, X) = randn(*shape), measured(shape[1])
    U, s, Vh = torch.linalg.svd(W @ X.T, full_matrices=False)
    first = U[:, :4] @ U[:, :4].T @ W
    U, s, Vh = torch.linalg.svd(W - first, full_matrices=False)
    expected = first + U[:, :2] * s[:2] @ Vh[:2]
    torch.testing.assert_close(dense("nsvd", W, data, 6, share=2 / 3), expected, rtol=1e-9, atol=1e-10)
    # what it gives up on the calibration data it wins on the weight
    G = data.gram.G
    loss = {n: float(((W - (a := dense(n, W, data, 6))) @ G * (W - a)).sum()) for n in ("svd-llm", "nsvd")}
    assert loss["svd-llm"] <= loss["nsvd"]


def test_long_curves_are_exact_at_their_knots_and_linear_in_between():
    W, (data, _) = randn(80, 70), measured(70, 200)
    stage, geometry = TwoStage(0.9), Geometry(data.metric())
    curve = stage.curve(W, geometry, torch.Generator())
    assert len(curve) == 71 and float(curve[0]) == pytest.approx(geometry.loss(W)) and float(curve[70]) < 1e-9
    knots = sorted({round(i * 70 / 64) for i in range(65)})
    assert len(knots) == 65
    for rank in knots[1::8]:
        exact = stage.factorize(W, geometry, rank, torch.Generator()).predicted
        assert float(curve[rank]) == pytest.approx(exact, rel=1e-8, abs=1e-9)
    (between,) = [r for r in range(71) if r not in knots][:1]
    assert float(curve[between]) == pytest.approx(float(curve[between - 1] + curve[between + 1]) / 2)


@pytest.mark.parametrize(("last", "layers"), [(0.3, {2}), (0.5, {1, 2}), (0.9, {0, 1, 2})])
def test_the_layers_in_front_stay_exact_and_the_budget_is_used_up(last, layers):
    model, before = tiny("llama-gqa"), tiny("llama-gqa")
    report = corank.compress(model, "ressvd", keep=0.8, last=last, tokenizer=tokenizer(), **DATA)
    assert {row["layer"] for row in report.sites if row["kind"] != "dense"} == layers
    sites = report.accounting["sites"]
    steps = [sum(row["shape"]) for row in report.sites if row["kind"] != "dense"]
    assert 0.8 * sites["dense"] - max(steps) < sites["compressed"] <= 0.8 * sites["dense"]
    for layer in {0, 1, 2} - layers:
        for name, p in before.model.layers[layer].named_parameters():
            assert torch.equal(model.model.layers[layer].get_parameter(name), p)


def test_too_few_layers_for_the_budget_are_refused():
    with pytest.raises(CorankError, match="no less than"):
        corank.compress(tiny("llama-gqa"), "ressvd", keep=0.3, last=0.3, tokenizer=tokenizer(), **DATA)
    with pytest.raises(CorankError, match="part of the layers"):
        recipe.get("ressvd").recipe(last=0)
    with pytest.raises(CorankError, match="plain"):
        recipe.get("ressvd").recipe(second="plane")
    with pytest.raises(CorankError, match="between 0 and 1"):
        recipe.get("nsvd").recipe(share=1.1)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("limit", [0.3, 0.55, 0.8, 0.97, 1.0])
def test_shares_in_proportion_to_weights_fill_the_budget(limit, pivoted):
    shapes = {"a": (40, 30), "b": (40, 30), "c": (20, 64), "left alone": (30, 30)}
    sites = [Site(name, "q", 0, shape, name, False) for name, shape in shapes.items()]

    def cost(site, rank):
        m, n = site.shape
        return rank * (m + n) - (rank * rank - rank if pivoted else 0)

    dense = sum(m * n for m, n in shapes.values())
    case = RankChoice(sites, [], int(limit * dense), cost, lambda site: None)
    if limit < 0.4:  # a fifth of all is left alone
        with pytest.raises(CorankError, match="no budget|no less than"):
            RankChoice(sites, [], 500, cost, lambda site: None).proportional({"a": 1.0})
    found = case.proportional({"a": 1.0, "b": 1.0, "c": 1.0})
    stored = {s.name: cost(s, found[s.name]) if s.name in found else s.numel for s in sites}
    assert "left alone" not in found and sum(stored.values()) <= limit * dense
    if len(found) == 3:
        assert abs(found["a"] - found["b"]) <= 1 and sum(stored.values()) > limit * dense - (40 + 30)
        assert abs(stored["c"] / 1280 - stored["b"] / 1200) < 0.2
    uneven = case.proportional({"a": 2.0, "b": 1.0, "c": 0.0})
    assert uneven["c"] == 1 and uneven.get("a", 99) >= uneven.get("b", 99)
    with pytest.raises(CorankError, match="needs a budget"):
        RankChoice(sites, [], None, cost, lambda site: None).proportional({"a": 1.0})


def test_adasvd_gives_more_rank_to_layers_that_change_less():
    model = tiny("llama-gqa")
    report = corank.compress(model, "adasvd", keep=0.7, ratios=True, lowest=0.2, tokenizer=tokenizer(), **DATA)
    kept = {}
    for row in report.sites:
        kept[row["layer"]] = kept.get(row["layer"], 0) + row["params"]
    from corank.methods.weights.adasvd import shares

    weights = shares([0.5, 0.0, 0.25], 0.2)
    assert (
        sum(weights) == pytest.approx(3) and weights[0] == pytest.approx(0.2) and weights[1] > weights[2] > weights[0]
    )
    assert shares([0.1, 0.4], 1.0) == [1.0, 1.0]
    sites = report.accounting["sites"]
    assert 0.65 * sites["dense"] < sites["compressed"] <= 0.7 * sites["dense"]
    assert max(kept.values()) > min(kept.values())


# --- AFM ---


def test_afm_is_the_affine_svd_llm_and_output_pca():
    W = randn(9, 12)
    data, X = measured(12, mean=3.0, affine=True)
    found = dense("afm", W, data, 4)
    torch.testing.assert_close(found, dense("svd-llm", W, data, 4, affine=True), rtol=0, atol=0)
    Y = X @ W.T
    C = torch.cov(Y.T, correction=0)
    U = torch.linalg.eigh(C).eigenvectors[:, -4:]
    torch.testing.assert_close(found, U @ U.T @ W, rtol=1e-8, atol=1e-9)
    lost = (Y - Y.mean(0)) - (X - X.mean(0)) @ found.T
    assert float(lost.square().sum() / len(X)) == pytest.approx(float(torch.linalg.eigvalsh(C)[:-4].sum()), rel=1e-8)


def test_afm_of_an_embedding_is_pca_weighted_by_frequency():
    model, before = tiny("llama-gqa", dtype=torch.float64), tiny("llama-gqa", dtype=torch.float64)
    corank.compress(model, "afm", keep=0.5, affine=False, targets=["embed"], tokenizer=tokenizer(), **DATA)
    layer = model.get_input_embeddings()
    ids = corank.model.calibration(tokenizer(), TEXT, 6, 16, 0).ids.flatten()
    E = before.get_input_embeddings().weight.detach()
    p = (torch.bincount(ids, minlength=len(E)) + 1.0).double()
    p /= p.sum()
    U = torch.linalg.eigh(E.T @ (p[:, None] * E)).eigenvectors[:, -layer.rank :]
    with torch.no_grad():
        found = layer(torch.arange(len(E)))
    torch.testing.assert_close(found, E @ U @ U.T, rtol=1e-8, atol=1e-9)
    centred = E - p @ E  # the published form keeps the mean beside k components: one more component is no worse
    affine = torch.linalg.eigvalsh(centred.T @ (p[:, None] * centred))[: -(layer.rank - 1)].sum()
    assert float((p[:, None] * (E - found).square()).sum()) <= float(affine) * (1 + 1e-10)
    with pytest.raises(CorankError, match="affine=false"):
        corank.compress(tiny("llama-gqa"), "afm", keep=0.5, targets=["embed"], tokenizer=tokenizer(), **DATA)


def test_a_metric_that_is_no_second_moment_says_so():
    data, _ = measured(5)
    assert data.metric(0.25).shrink == 0.25 and data.metric().shrink == 0.0
    assert data.diagonal(torch.ones(5)).shrink is None and Metric().shrink is None
