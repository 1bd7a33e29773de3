"""Pruning by movement, the factorization it is for, and training with matrices and factors in turn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from corank.errors import CorankError
from corank.factors import LowRankLinear, weight_of
from corank.linalg import truncate
from corank.methods.training.lpaf import factorize, prune, refine
from corank.training.mixed_rank import consistency
from corank.training.movement import MovementPruning, Pruned, share_kept, top_mask
from factorized import linears, logits, loss
from tiny import tiny

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(20, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def error(model):
    return (model(X) - Y).square().mean()


def test_the_share_falls_as_a_cubic_between_two_plateaus():
    shares = [share_kept(t, 100, 0.2, begin=0.1, settle=0.3) for t in range(101)]
    assert shares[:11] == [1.0] * 11 and shares[70:] == [0.2] * 31
    assert all(a >= b for a, b in zip(shares, shares[1:], strict=False))
    assert shares[40] == pytest.approx(0.2 + 0.8 * 0.5**3, abs=1e-12)
    assert share_kept(0, 1, 1.0) == 1.0


def test_the_mask_keeps_exactly_so_many():
    scores = torch.tensor([[0.0, 3.0, 3.0], [-1.0, 3.0, 0.0]])
    assert top_mask(scores, 1 / 3).tolist() == [[False, True, True], [False, False, False]]
    for keep in (0.0, 0.2, 0.5, 1.0):
        assert int(top_mask(torch.zeros(7, 11), keep).sum()) == round(keep * 77)


def test_scores_are_minus_weight_times_gradient_of_masked_weights_too():
    model = network()
    pruning = MovementPruning(model, ["0", "2"], 0.5, steps=10)
    plain = network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    expected = [torch.zeros(7, 6, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64)]
    masks = [torch.ones_like(e, dtype=torch.bool) for e in expected]
    weights = [plain[0].weight, plain[2].weight]
    for t in range(10):
        with torch.no_grad():  # by hand: a network that holds the masked weights
            kept = [w.clone() for w in weights]
            for w, mask in zip(weights, masks, strict=True):
                w.mul_(mask)
        for optimizer, loss_of in zip(optimizers, (error(model), error(plain)), strict=True):
            optimizer.zero_grad()
            loss_of.backward()
        with torch.no_grad():
            for i, w in enumerate(weights):
                expected[i] -= kept[i] * w.grad
                w.copy_(kept[i])
                w.grad *= masks[i]
        for optimizer in optimizers:
            optimizer.step()
        share = pruning.step(t + 1)
        masks = [top_mask(e, share) for e in expected]
    assert share == 0.5
    pruned = pruning.finish()
    for i, name in enumerate(("0", "2")):
        torch.testing.assert_close(pruned[name].scores, expected[i], rtol=1e-10, atol=1e-14)
        assert torch.equal(pruned[name].mask, masks[i])
        torch.testing.assert_close(pruned[name].W, weights[i].detach() * masks[i], rtol=1e-10, atol=1e-14)
        assert int((pruned[name].W == 0).sum()) == masks[i].numel() - int(masks[i].sum())
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, pruned[name].W) and layer.weight.requires_grad


def test_a_masked_weight_can_come_back():
    model = network()
    pruning = MovementPruning(model, ["0"], 0.5, steps=4)
    mask = model[0].parametrizations.weight[0]
    mask.scores.copy_(torch.arange(42.0).view(7, 6))
    pruning.step(4)
    assert not mask.mask[0, 0] and mask.mask[6, 5]
    mask.scores[0, 0] = 100.0
    pruning.step(4)
    assert mask.mask[0, 0] and int(mask.mask.sum()) == 21


def sparse(keep, seed=0, shape=(9, 12)):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=g, dtype=torch.float64)
    scores = torch.randn(shape, generator=g, dtype=torch.float64)
    mask = top_mask(scores, keep)
    return Pruned(W * mask, mask, scores)


def test_sparsity_aware_svd_is_the_svd_without_sparsity():
    full = sparse(1.0)
    plain = truncate(full.W, rank=4).pair(full.W, 4)
    for weighting in ("count", "none"):
        found = factorize(full, 4, weighting)
        torch.testing.assert_close(found.dense(), plain[0] @ plain[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", ["count", "score"])
def test_sparsity_aware_svd_minimises_the_weighted_error(weighting):
    part = sparse(0.3)
    part.W[:, 3], part.mask[:, 3] = 0.0, False
    d2 = 1.0 + part.mask.sum(0) if weighting == "count" else (part.scores.clamp_min(0) * part.mask).sum(0)
    d2 = d2.double().clamp_min(1e-6 * float(d2.max()))
    found = factorize(part, 3, weighting)
    assert bool((found.A[:, 3] == 0).all())  # a column of zeros stays one
    S = part.W * d2.sqrt()
    tail = torch.linalg.svdvals(S)[3:].square().sum()
    reached = ((part.W - found.dense()) * d2.sqrt()).square().sum()
    torch.testing.assert_close(reached, tail, rtol=1e-10, atol=0)
    g = torch.Generator().manual_seed(4)
    for _ in range(5):
        other = (found.B + 1e-3 * torch.randn(9, 3, generator=g, dtype=torch.float64)) @ found.A
        assert ((part.W - other) * d2.sqrt()).square().sum() > reached
    assert factorize(part, 9, weighting).dense().sub(part.W).abs().max() < 1e-12


def train_mixed(anneal, steps=6, seed=0, names=("0", "2")):
    model = network()
    pruned = {n: Pruned(weight_of(model.get_submodule(n)).clone(), *[torch.ones(1)] * 2) for n in names}
    mixing = refine(model, pruned, {"0": 3, "2": 2}, steps, "none", anneal, seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen = []
    for t in range(steps):
        seen.append(mixing.draw(t))
        optimizer.zero_grad()
        error(model).backward()
        optimizer.step()
    return model, mixing, seen


def test_without_annealing_it_is_ordinary_training_of_factors():
    model, mixing, seen = train_mixed(anneal=0.0)
    assert seen == [0] * 6
    plain = network()
    for name, rank in (("0", 3), ("2", 2)):
        old = plain.get_submodule(name)
        W = weight_of(old).clone()
        pair = factorize(Pruned(W, torch.ones(1), torch.ones(1)), rank, "none")
        plain.set_submodule(name, pair.module(old.bias))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        error(plain).backward()
        optimizer.step()
    mixing.finish()
    assert {type(model[i]) for i in (0, 2)} == {LowRankLinear}
    state = model.state_dict()
    assert (
        all(torch.equal(v, state[n]) for n, v in plain.state_dict().items())
        and state.keys() == plain.state_dict().keys()
    )


def test_a_full_layer_is_its_matrix_and_does_not_train():
    model = network()
    dense = error(model).item()
    pruned = {"0": Pruned(weight_of(model[0]).clone(), torch.ones(1), torch.ones(1))}
    mixing = refine(model, pruned, {"0": 2}, 10, "none", anneal=1.0)
    assert mixing.probability(0) == 1.0 and mixing.probability(5) == 0.5 and mixing.probability(10) == 0.0
    assert mixing.draw(0) == 1
    before = error(model)
    assert before.item() == pytest.approx(dense, abs=1e-14)
    before.backward()
    assert model[0].factors.down.weight.grad is None and model[0].factors.up.weight.grad is None
    assert model[0].factors.up.bias.grad is not None and "matrix" not in dict(model[0].named_parameters())
    mixing.low()
    low = error(model).item()
    assert low != pytest.approx(dense, abs=1e-6)
    mixing.draw(0)
    assert error(model.eval()).item() == low  # in evaluation it is what will be stored
    mixing.finish()
    assert error(model).item() == low


def test_coins_fall_as_often_as_they_should_and_the_same_way_again():
    model = network()
    pruned = {n: Pruned(weight_of(model.get_submodule(n)).clone(), *[torch.ones(1)] * 2) for n in ("0", "2")}
    mixing = refine(model, pruned, {"0": 2, "2": 2}, 4000, "none", anneal=1.0)
    share = sum(mixing.draw(t) for t in range(4000)) / 8000
    assert abs(share - 0.5) < 0.02  # 5 standard deviations are 0.023 of independent fair coins
    first, again, other = (train_mixed(1.0, seed=seed)[2] for seed in (0, 0, 5))
    assert first == again and (first != other)


def test_consistency_is_the_divergence_and_trains_the_factors_alone():
    g = torch.Generator().manual_seed(0)
    low, mixed = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = consistency(low, mixed)
    p, q = mixed.detach().softmax(-1), low.detach().softmax(-1)
    torch.testing.assert_close(found.detach(), (p * (p / q).log()).sum(-1).mean(), rtol=1e-12, atol=0)
    found.backward()
    assert mixed.grad is None
    torch.testing.assert_close(low.grad, (q - p) / 6, rtol=1e-10, atol=1e-14)
    assert float(consistency(mixed, mixed)) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d"])
def test_on_a_language_model(name):
    model = tiny(name, dtype=torch.float64).train()
    names = list(linears(model))[:5]
    ranks = {n: 4 for n in names}
    pruning = prune(model, names, 0.4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for t in range(4):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        pruning.step(t + 1)
    pruned = pruning.finish()
    sparse_logits = logits(model)
    assert all(int(p.mask.sum()) == round(0.4 * p.mask.numel()) for p in pruned.values())
    whole = copy.deepcopy(model)
    refine(whole, pruned, {n: min(p.W.shape) for n, p in pruned.items()}, 2).finish()
    torch.testing.assert_close(logits(whole), sparse_logits, rtol=0, atol=1e-10)  # full rank loses nothing
    mixing = refine(model, pruned, ranks, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for t in range(4):
        mixing.draw(t)
        optimizer.zero_grad()
        loss(model.train()).backward()
        optimizer.step()
    mixing.finish()
    assert [type(model.get_submodule(n)) for n in names] == [LowRankLinear] * 5
    assert bool(torch.isfinite(logits(model)).all())


def test_wrong_input():
    model = network()
    for keep, steps in ((0.0, 4), (1.5, 4), (0.5, 0)):
        with pytest.raises(CorankError):
            MovementPruning(model, ["0"], keep, steps)
    assert type(model[0]) is nn.Linear
    with pytest.raises(CorankError, match="between 0 and 9, got 10"):
        factorize(sparse(0.5), 10)
    with pytest.raises(CorankError, match="Unknown weighting 'counts'; nearest: count"):
        factorize(sparse(0.5), 2, "counts")
    with pytest.raises(CorankError, match="anneal between 0 and 1"):
        refine(model, {"0": sparse(0.5, shape=(7, 6))}, {"0": 2}, 4, anneal=2.0)
