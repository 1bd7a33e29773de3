"""Learned masks: the arithmetic of the masks, gradients against autograd through the whole model, planted solutions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from jobs import DATA, TEXT, job_for, measured

import corank
from corank.budget import ALLOCATORS, Curve
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.probing import training
from corank.probing.masks import Buckets, Positions
from corank.probing.training import Trainer, balance
from tiny import saved, tiny, tokenizer

FAMILIES = [Buckets, Positions]


def curves_of(shapes=((24, 24), (37, 24), (12, 24))):
    found = []
    for i, (m, n) in enumerate(shapes):
        p = min(m, n)
        ranks = np.arange(p + 1)
        found.append(Curve(f"s{i}", (m, n), ranks, 0.8**ranks - 0.8**p, ranks * (m + n), m * n))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_masks_fall_and_their_sizes_meet_the_budget(family, share):
    curves = curves_of()
    limit = int(share * sum(c.dense_cost for c in curves))
    masks = family(curves, share)
    masks.theta += torch.randn(masks.theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    t = balance(masks, limit)
    assert float(masks.sizes(t).sum()) == pytest.approx(limit, rel=1e-6)
    assert float(masks.sizes(t + 0.5).sum()) > limit > float(masks.sizes(t - 0.5).sum())
    for (mask, dense), need, curve in zip(masks.weights(t, 1.0), masks.needs(t), curves, strict=True):
        assert (
            (mask.diff() <= 1e-12).all() and mask.min() >= dense - 1e-12 and 0 <= dense <= 1 and mask.max() <= 1 + 1e-12
        )
        assert len(mask) <= min(curve.shape)
        useful = need[curve.cost < curve.dense_cost]
        assert (np.diff(useful) < 0).all() and useful.min() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_differentiated_through(family):
    """Against finite differences: with the shift that keeps the size, one mask's gain is the others' loss."""
    curves = curves_of()
    limit = int(0.45 * sum(c.dense_cost for c in curves))
    masks = family(curves, 0.45)
    start = masks.theta.clone() + torch.linspace(0, 0.05, masks.theta.numel(), dtype=torch.float64).view(
        masks.theta.shape
    )

    def value(theta):
        masks.theta = theta
        kept = [
            mask.square().sum() * (i + 1) + dense
            for i, (mask, dense) in enumerate(masks.weights(balance(masks, limit), 0))
        ]
        return torch.stack(kept).sum()

    theta = start.clone().requires_grad_()
    gradient = torch.autograd.grad(value(theta), theta)[0].flatten()
    size = 1e-5
    for i in range(0, start.numel(), 3):
        step = torch.zeros(start.numel(), dtype=torch.float64)
        step[i] = size
        step = step.view(start.shape)
        slope = float(value(start + step) - value(start - step)) / (2 * size)
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharp_mask_is_rounded_to_its_rank(family):
    curves = curves_of()
    ranks = [5, 8, 3]
    masks = family(curves, 0.5)
    if family is Positions:
        masks.theta = torch.tensor([(r - 0.5) / min(c.shape) for r, c in zip(ranks, curves, strict=True)]).double()
    else:
        wanted = torch.tensor([float(c.cost_at(r)) for r, c in zip(ranks, curves, strict=True)])
        masks.theta = -(((masks._cost - wanted[:, None]) / masks._cost.max()) ** 2) * 1e4
    limit = sum(c.cost_at(r) for r, c in zip(ranks, curves, strict=True))
    needs = masks.needs(torch.zeros((), dtype=torch.float64))
    rewritten = [
        Curve(c.site, c.shape, c.ranks, need, c.cost, c.dense_cost) for c, need in zip(curves, needs, strict=True)
    ]
    found = ALLOCATORS["ara"](rewritten, limit)
    step = 1 if family is Positions else max(int(c.ranks[c.cost < c.dense_cost][-1]) // 8 for c in curves)
    assert all(abs(found[f"s{i}"] - rank) <= step for i, rank in enumerate(ranks))
    assert sum(c.cost_at(found[c.site]) for c in curves) <= limit


@pytest.mark.parametrize(
    ("name", "method"), [("llama-gqa", "svd-llm"), ("gpt2-conv1d", "lord"), ("qwen2-bias", "best")]
)
def test_gradients_are_those_of_the_whole_model(name, method, tmp_path):
    """Against autograd through a copy of the model whose weights are functions of the masks."""
    model = tiny(name, dtype=torch.float64)
    job = job_for(model, tmp_path, method, allocate="ara")
    store, curves = measured(job)
    trainer = Trainer(job, store, [c.site for c in curves])
    stream = Stream(job.source, job.data, training.SEQUENCES)
    generator = torch.Generator().manual_seed(1)
    weights = []
    for c in curves:
        mask = torch.rand(min(c.shape) - 2, generator=generator, dtype=torch.float64).sort(descending=True).values
        weights += [mask, mask[-1] * 0.5]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss, gradients = trainer.gradients(stream, 1, trainer._dense(stream)[1], weights)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    leaves = [w.clone().requires_grad_() for w in weights]
    parameters = {}
    for i, c in enumerate(curves):
        basis, layer = trainer._basis(i), model.get_submodule(c.site)
        conv = type(layer).__name__ == "Conv1D"
        W = (layer.weight.T if conv else layer.weight).detach()
        mask, dense = leaves[2 * i], leaves[2 * i + 1]
        k = len(mask)
        new = (basis.up[:, :k] * (mask - dense)) @ (basis.project[:k] @ W) + dense * W
        parameters[f"{c.site}.weight"] = new.T if conv else new
        if basis.offset is not None:  # about the mean: the bias absorbs what the mean loses
            bias = 0.0 if layer.bias is None else layer.bias.detach()
            Wmean = basis.offset - bias
            site = next(s for s in job.sites if s.name == c.site)
            mean = training.results_of(job, store, site.layer, None)(site, {}).gram.mean if job.recipe.affine else None
            if mean is not None:
                torch.testing.assert_close(Wmean, W @ mean)
                parameters[f"{c.site}.bias"] = bias + Wmean - new @ mean
    ids = job.data.ids[2:4]
    q = torch.func.functional_call(model, parameters, kwargs={"input_ids": ids}).logits.log_softmax(-1)
    p = model(input_ids=ids).logits.log_softmax(-1).detach()
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-9) and loss > 1e-3
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def planted():
    """All of layer 1 is silent, everything else matters."""
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("method", ["ara", "dobi-svd"])
def test_learned_ranks_find_what_does_not_matter(method):
    model, settings = planted(), dict(data=TEXT, tokenizer=tokenizer(), **DATA)
    report = corank.compress(model, method, keep=0.7, steps=32, **settings)
    kept = {}
    for layer in range(3):
        rows = [row for row in report.sites if row["layer"] == layer]
        kept[layer] = sum(row["params"] for row in rows) / sum(row["params_dense"] for row in rows)
    assert kept[1] < 0.45 and min(kept[0], kept[2]) > 0.75
    sites = report.accounting["sites"]
    assert 0.65 * sites["dense"] < sites["compressed"] <= 0.7 * sites["dense"]


@pytest.mark.parametrize("method", ["ara", "dobi-svd"])
def test_learned_ranks_lose_less_than_uniform_ones_and_repeat_with_the_seed(method, tmp_path):
    dense = tiny("llama-gqa")
    ids = corank.model.calibration(tokenizer(), TEXT, 30, 16, 5).ids

    def divergence(model):
        with torch.no_grad():
            p, q = (torch.log_softmax(m(input_ids=ids).logits, -1) for m in (dense, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    found = []
    for allocate in (method, method, "uniform"):
        model = copy.deepcopy(dense)
        report = corank.compress(
            model, "svd-llm", keep=0.6, allocate=allocate, data=TEXT, tokenizer=tokenizer(), **DATA
        )
        found.append(([row["rank"] for row in report.sites], divergence(model)))
    assert found[0] == found[1]
    assert found[0][1] < found[2][1]


def test_streamed_masks_are_the_same_and_are_kept(tmp_path, monkeypatch):
    folder = saved("llama-gqa", tmp_path / "dense")
    settings = dict(keep=0.7, allocate="ara", steps=4, data=TEXT, **DATA)
    streamed = corank.compress(folder, "svd-llm", out=tmp_path / "out", cache=tmp_path / "cache", **settings)
    resident = corank.compress(tiny("llama-gqa"), "svd-llm", tokenizer=tokenizer(), **settings)
    assert [row["rank"] for row in streamed.sites] == [row["rank"] for row in resident.sites]
    trained = []
    monkeypatch.setattr(Trainer, "train", lambda self, masks, limit: trained.append(limit))
    again = corank.compress(folder, "svd-llm", out=tmp_path / "again", cache=tmp_path / "cache", **settings)
    assert not trained and [row["rank"] for row in again.sites] == [row["rank"] for row in streamed.sites]
    corank.compress(folder, "svd-llm", out=tmp_path / "third", cache=tmp_path / "cache", **{**settings, "keep": 0.6})
    assert len(trained) == 1


def test_what_cannot_be_masked_is_explained():
    settings = dict(keep=0.7, allocate="dobi-svd", data=TEXT, tokenizer=tokenizer(), **DATA)
    with pytest.raises(CorankError, match="weighs the components of a truncation"):
        corank.compress(tiny("llama-gqa"), "col-id", **settings)
