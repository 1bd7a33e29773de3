"""Gradients of the loss against autograd, first-order changes against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import DATA, TEXT, job_for, measured

import corank
from corank.errors import CorankError
from corank.linalg import truncate
from corank.probing import look
from corank.probing.first_order import removal
from corank.statistics import MeanGradient
from tiny import tiny, tokenizer


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d"])
def test_the_mean_gradient_is_that_of_autograd(name, tmp_path):
    model = tiny(name, dtype=torch.float64)
    job = job_for(model, tmp_path, "zs-svd")
    store, _ = measured(job)
    ids = job.data.ids
    logits = model(input_ids=ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / ids.numel()
    loss.backward()
    for site in job.sites:
        D = store.load(site.layer, "gradients", {"gradient-mean"})[site.name]["gradient-mean"].result().D
        layer = model.get_submodule(site.name)
        wanted = layer.weight.grad.T if type(layer).__name__ == "Conv1D" else layer.weight.grad
        torch.testing.assert_close(D, wanted, rtol=1e-5, atol=1e-7 * float(wanted.abs().max()))
        assert D.abs().max() > 0


def test_first_order_changes_add_up_and_match_their_definition():
    g = torch.Generator().manual_seed(0)
    for m, n in ((7, 12), (12, 7)):
        W, D, X = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((m, n), (m, n), (n, 40)))
        R = torch.randn(m, m, generator=g, dtype=torch.float64)
        for metric in (None, R @ R.T):
            truncation = truncate(W, X @ X.T, R=metric)
            change = removal(W, D, truncation)
            for i in range(min(m, n)):
                component = torch.outer(truncation.up[:, i], truncation.project[i]) @ W
                assert float(change[i]) == pytest.approx(-float((D * component).sum()), rel=1e-9, abs=1e-12)
            assert float(change.sum()) == pytest.approx(-float((D * W).sum()), rel=1e-9)


def test_curves_are_shown_the_change_at_every_rank(tmp_path):
    model = tiny("llama-gqa", dtype=torch.float64)
    job = job_for(model, tmp_path, "zs-svd")
    store, curves = measured(job)
    found = look.look(job, store, curves, job.limit).curves
    for curve in found:
        site = next(s for s in job.sites if s.name == curve.site)
        D = store.load(site.layer, "gradients", {"gradient-mean"})[site.name]["gradient-mean"].result().D
        W = model.get_submodule(site.name).weight.detach()
        assert curve.first_order[-1] == 0 and len(curve.first_order) == min(site.shape) + 1
        assert curve.first_order[0] == pytest.approx(-float((D * W).sum()), rel=1e-6, abs=1e-9)


def test_the_budget_is_met_within_one_step(tmp_path):
    for keep in (0.9, 0.6, 0.3):
        report = corank.compress(tiny("qwen2-bias"), "zs-svd", keep=keep, data=TEXT, tokenizer=tokenizer(), **DATA)
        sites = report.accounting["sites"]
        largest = max(sum(row["shape"]) for row in report.sites)
        dense_step = max(np.prod(row["shape"]) for row in report.sites)
        assert keep * sites["dense"] - dense_step <= sites["compressed"] <= keep * sites["dense"]
        if all(row["kind"] != "dense" for row in report.sites):
            assert sites["compressed"] > keep * sites["dense"] - largest


def test_what_has_no_components_is_explained():
    settings = dict(keep=0.7, allocate="zs-svd", data=TEXT, tokenizer=tokenizer(), **DATA)
    with pytest.raises(CorankError, match="weighs the components of a truncation"):
        corank.compress(tiny("llama-gqa"), "col-id", **settings)
    with pytest.raises(CorankError, match="labels=sampled makes the mean gradient pure noise"):
        corank.compress(tiny("llama-gqa"), "svd-llm", labels="sampled", **settings)
    examples = [{"input_ids": torch.randint(3, 60, (2, 16))}]
    with pytest.raises(CorankError, match="measures gradients, but gradients of the loss on text"):
        corank.compress(tiny("llama-gqa"), "best", keep=0.7, allocate="zs-svd", data=examples)


def test_inputs_and_gradients_are_of_the_same_tokens():
    with pytest.raises(CorankError, match="of the same tokens"):
        MeanGradient(3, 4).update(torch.zeros(2, 5, 4), torch.zeros(2, 4, 3))
