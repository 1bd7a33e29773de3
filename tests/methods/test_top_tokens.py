"""The output metric of predictions among the most probable tokens: an exact Fisher, and how it is sampled."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import corank
from corank import recipe
from corank.engine import gradients
from corank.engine.gradients import most_probable, next_token_loss, sweep
from corank.model import Calibration, ResidentModel, Text
from tiny import text, tiny, tokenizer, windows

DATA = dict(data=Text(text(), "words"), samples=6, length=16, batch=4)


def metrics(model, data, labels, seed=0, batch=2):
    source, found = ResidentModel(model), {}

    def keep(_layer, _part, table):
        for name, named in table.items():
            found[name] = named["gradient"] if name not in found else found[name].merge(named["gradient"])

    sweep(source, data, batch, source.outline.sites, ["gradient"], lambda *_: None, keep, labels=labels, seed=seed)
    return {name: statistic.result().R for name, statistic in found.items()}


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d"])
def test_the_labels_weighted_by_their_probability_give_the_curvature_of_the_divergence(name, monkeypatch):
    """Two tokens are one prediction: all K labels in turn, weighted, against the Hessian of the KL divergence itself."""
    K = 4
    model = tiny(name, dtype=torch.float64)
    ids = torch.tensor([[5, 9]])
    data = Calibration(ids, None, {"text": "two tokens"})
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, 0]
    top = logits.topk(K).indices
    p = torch.softmax(logits[top], -1)
    expected = {}
    for c in range(K):
        monkeypatch.setattr(gradients, "draw", lambda logits, _g, c=c: torch.full(logits.shape[:-1], c))
        for site, R in metrics(model, data, f"top{K}").items():
            expected[site] = expected.get(site, 0.0) + p[c] * R * 2  # the second token has no gradient
    for site in (f for f in expected if f.endswith(("down_proj", "c_proj", "v_proj"))):
        module = model.get_submodule(site)

        def divergence(delta, module=module):
            hook = module.register_forward_hook(lambda _m, _a, out: torch.cat([out[:, :1] + delta, out[:, 1:]], 1))
            try:
                moved = model(input_ids=ids, use_cache=False).logits[0, 0][top]
            finally:
                hook.remove()
            return torch.sum(p * (torch.log(p) - torch.log_softmax(moved, -1)))

        size = expected[site].shape[0]
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
            hessian = torch.autograd.functional.hessian(divergence, torch.zeros(size, dtype=torch.float64))
        # the KL's second derivative at zero is J^T (diag p - p p^T) J: its other term has the factor p - p = 0
        torch.testing.assert_close(expected[site], hessian, rtol=1e-4, atol=1e-6 * float(hessian.abs().max()))


def test_the_sweep_is_back_propagation_of_the_confined_loss(monkeypatch):
    model, data = tiny("qwen2-bias", dtype=torch.float64), windows(4, 10, padded=True)
    monkeypatch.setattr(gradients, "draw", lambda logits, _g: torch.full(logits.shape[:-1], 1))
    found = metrics(model, data, "top3")
    name = "model.layers.0.self_attn.o_proj"
    total, count = 0.0, 0
    for i in range(len(data.ids)):
        ids, mask = data.ids[i : i + 1], data.mask[i : i + 1]
        kept = []

        def hook(_m, _a, out, kept=kept):
            out.retain_grad()
            kept.append(out)

        handle = model.get_submodule(name).register_forward_hook(hook)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        handle.remove()
        second = torch.log_softmax(logits.topk(3).values, -1)[:, :-1, 1]
        (-(second * mask[:, 1:]).sum()).backward()
        g = kept[0].grad[mask]
        total, count = total + g.T @ g, count + len(g)
    torch.testing.assert_close(found[name], total / count, rtol=1e-4, atol=1e-9)


def test_all_tokens_are_the_true_fisher_and_few_are_a_smaller_one():
    """With K = V the same distribution is sampled from; the label is drawn from the sorted one, so the draws differ."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 30, generator=g)
    assert most_probable(logits, "data") is logits and most_probable(logits, "sampled") is logits
    every = most_probable(logits, "top30")
    assert torch.equal(every, most_probable(logits, "top999")) and torch.equal(
        every.sort().values, logits.sort().values
    )
    few = most_probable(logits, "top5")
    assert few.shape == (2, 7, 5) and torch.equal(few, logits.sort(descending=True).values[..., :5])
    ids = torch.zeros(2, 7, dtype=torch.long)
    best = torch.log_softmax(few, -1)[:, :-1, 0].sum()
    assert float(next_token_loss(few, ids, None, True)) == pytest.approx(-float(best), rel=1e-5)


def test_the_metric_follows_the_seed_and_is_kept_apart_from_others(tmp_path):
    model, data = tiny("llama-gqa"), windows(4, 10)
    site = "model.layers.1.mlp.up_proj"
    a, b, c = (metrics(model, data, "top5", seed=s)[site] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, c)
    weights = []
    for settings in ({}, dict(top=2), dict(labels="data"), {}):
        copy = tiny("llama-gqa")
        corank.compress(copy, "io-svd", keep=0.7, cache=tmp_path, tokenizer=tokenizer(), **settings, **DATA)
        weights.append(torch.cat([m.dense_weight().flatten() for m in copy.modules() if hasattr(m, "dense_weight")]))
    assert torch.equal(weights[0], weights[3])
    assert not any(w.shape == weights[0].shape and torch.allclose(w, weights[0]) for w in weights[1:3])


def test_io_svd_on_sampled_labels_without_clipping_is_kfac_svd():
    settings = dict(shrink_inputs=0.1, shrink_outputs=0.3, labels="sampled", allocate="uniform")
    first, second = tiny("llama-gqa", dtype=torch.float64), tiny("llama-gqa", dtype=torch.float64)
    corank.compress(first, "io-svd", keep=0.7, tokenizer=tokenizer(), **settings, **DATA)
    corank.compress(second, "kfac-svd", keep=0.7, clip=False, tokenizer=tokenizer(), **settings, **DATA)
    for (name, a), (_, b) in zip(first.named_modules(), second.named_modules(), strict=True):
        if hasattr(a, "dense_weight"):
            assert torch.equal(a.dense_weight(), b.dense_weight()), name
    assert recipe.get("io-svd").recipe().labels == "top5"
