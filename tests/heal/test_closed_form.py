"""Refits in closed form: the exact minimisers, in the stored structure, against least squares and gradient descent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from corank.factors import CUR, LowRank, SharedLowRank, weight_of
from corank.heal import Schedule, refit, train
from corank.heal.refit import refitted
from corank.heal.ways.closed_form import MIXES, RIDGE, aim_at, put
from corank.model import ResidentModel
from corank.statistics import CrossGram
from factorized import KINDS, across, compressed, factors_of, mixed
from tiny import tiny, windows


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n, tokens, seed=1):
    X = numbers(n, tokens, seed=seed)
    return X @ X.T / tokens


def objective(target, factors, H):
    D = target - factors.dense()
    return float(((D @ H) * D).sum())


M, N, K = 9, 7, 3


@pytest.fixture(params=[40, 4], ids=["full", "singular"])
def problem(request):
    """A target and a metric, of full rank or from fewer tokens than channels."""
    return numbers(M, N), moment(N, request.param)


def link_gradient(target, cur, H):
    return cur.C.T @ (target - cur.dense()) @ H @ cur.R.T


@pytest.mark.parametrize("dependent", [False, True])
def test_the_link_is_the_minimiser(problem, dependent):
    target, H = problem
    cur = factors_of("cur", numbers(M, N, seed=3), K)
    if dependent:  # a column twice, a row of zeros
        C, R = cur.C.clone(), cur.R.clone()
        C[:, 2], R[1] = C[:, 0], 0
        cur = CUR(C, cur.M, R)
    best = refitted(cur, target, H)
    assert torch.equal(best.C, cur.C) and torch.equal(best.R, cur.R)
    size = float(cur.C.norm() * target.norm() * H.norm() * cur.R.norm())
    assert float(link_gradient(target, best, H).abs().max()) < 1e-12 * size
    least = objective(target, best, H)
    for seed in range(5):
        for scale in (1e-3, 1.0):
            other = CUR(best.C, best.M + scale * numbers(K, K, seed=seed), best.R)
            assert objective(target, other, H) >= least - 1e-12
    full = numbers(M, N, seed=9)
    if not dependent and H.trace() > 0 and torch.linalg.matrix_rank(H) == N:
        worse = CUR(best.C, best.M + 1e-2 * full[:K, :K], best.R)
        assert objective(target, worse, H) > least


def test_the_link_is_where_its_own_gradient_descent_ends():
    target, H = numbers(M, N), moment(N, 40)
    C, R = torch.linalg.qr(numbers(M, 2, seed=3))[0], torch.linalg.qr(numbers(N, 2, seed=4))[0].T
    exact = refitted(CUR(C, torch.zeros(2, 2, dtype=C.dtype), R), target, H)
    link, rate = numbers(2, 2, seed=5), 0.9 / float(torch.linalg.eigvalsh(R @ H @ R.T).max())
    for _ in range(400):  # of || (W - C M R) H^(1/2) ||^2 / 2
        link = link + rate * link_gradient(target, CUR(C, link, R), H)
    torch.testing.assert_close(link, exact.M, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refit_keeps_the_structure_and_never_loses(problem, kind):
    target, H = problem
    factors = factors_of(kind, numbers(M, N, seed=3), K)
    before = objective(target, factors, H)
    for steps in (1, 2, 5):
        new = refitted(factors, target, H, steps=steps)
        after = objective(target, new, H)
        assert after <= before * (1 + 1e-10) and new.kind == factors.kind and new.rank == factors.rank
        before = after
    if hasattr(factors, "pivots"):
        assert torch.equal(new.pivots, factors.pivots)
    assert after < 0.9 * objective(target, factors, H)


@pytest.mark.parametrize("kind", ["low_rank", "row_pivoted", "column_pivoted"])
def test_each_free_part_is_the_minimiser_for_the_others(kind):
    target, H = numbers(M, N), moment(N, 40)
    new = refitted(factors_of(kind, numbers(M, N, seed=3), K), target, H, steps=200)
    for name, value in new.tensors().items():
        if not value.is_floating_point():
            continue
        moved = value.clone().requires_grad_()
        tensors = {**new.tensors(), name: moved}
        (g,) = torch.autograd.grad(error_of(kind, tensors, target, H), moved)
        assert float(g.abs().max()) < 1e-6 * float(target.norm() * H.norm()), name


@pytest.mark.parametrize("kind", ["row_pivoted", "column_pivoted"])
def test_pivots_that_became_dependent_are_refitted_part_by_part(kind, monkeypatch):
    target, H = numbers(M, N), moment(N, 40)
    factors = factors_of(kind, numbers(M, N, seed=3), K)
    together = refitted(factors, target, H, steps=1)
    monkeypatch.setattr(refit, "LARGEST", 0.0)
    by_parts = [refitted(factors, target, H, steps=n) for n in (1, 2, 40)]
    losses = [objective(target, f, H) for f in (factors, *by_parts)]
    assert losses == sorted(losses, reverse=True) and objective(target, together, H) < losses[0]
    last = "rows" if kind == "row_pivoted" else "rest"
    moved = by_parts[0].tensors()[last].clone().requires_grad_()
    (g,) = torch.autograd.grad(error_of(kind, {**by_parts[0].tensors(), last: moved}, target, H), moved)
    assert float(g.abs().max()) < 1e-9 * float(target.norm() * H.norm())


def error_of(kind, t, target, H):
    """The objective, differentiable in the stored tensors."""
    if kind == "low_rank":
        W = t["B"] @ t["A"]
    elif kind == "row_pivoted":
        others = [i for i in range(M) if i not in t["pivots"].tolist()]
        W = torch.zeros_like(target).index_put((t["pivots"].long(),), t["rows"])
        W = W.index_put((torch.tensor(others),), t["rest"] @ t["rows"])
    else:
        others = [i for i in range(N) if i not in t["pivots"].tolist()]
        W = torch.zeros_like(target).mT.index_put((t["pivots"].long(),), t["columns"].mT)
        W = W.index_put((torch.tensor(others),), (t["columns"] @ t["rest"]).mT).mT
    D = target - W
    return ((D @ H) * D).sum()


def test_the_truncation_of_the_target_is_left_where_it_is():
    target, H = numbers(M, N), moment(N, 40)
    best = optimum(target, H)
    new = refitted(best, target, H)
    torch.testing.assert_close(new.dense(), best.dense(), rtol=1e-8, atol=1e-10)


def optimum(target, H):
    """The best rank K, from the SVD of W S with H = S S^T."""
    S = torch.linalg.cholesky(H)
    U, s, Vh = torch.linalg.svd(target @ S)
    return LowRank(U[:, :K] * s[:K], torch.linalg.solve_triangular(S, Vh[:K], upper=False, left=False))


def test_a_basis_that_others_read_stays():
    target, H = numbers(M, N), moment(N, 40)
    low = factors_of("low_rank", numbers(M, N, seed=3), K)
    owner = refitted(low, target, H, basis=False)
    follower = refitted(SharedLowRank(low.B, low.A, "owner"), target, H)
    assert torch.equal(owner.A, low.A) and torch.equal(owner.B, follower.B)
    assert objective(target, owner, H) < objective(target, low, H)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("s", MIXES)
def test_the_output_factor_and_the_bias_are_those_of_least_squares(bias, s):
    tokens = 30
    x, seen = 1 + numbers(tokens, N), numbers(tokens, N, seed=1)
    dense = nn.Linear(N, M, bias=bias).double()
    low = factors_of("low_rank", dense.weight.detach(), K)
    layer = low.module(None if dense.bias is None else dense.bias.detach()).double()
    joint = CrossGram(N)
    joint.update(x, seen)
    with torch.no_grad():
        put(layer, aim_at(dense, layer, joint.result()), s, basis=False)
    # || t - B (A x^) - b ||^2 / T + rho || W - B A ||^2 as one least-squares problem in (B, b)
    W = dense.weight.detach()
    t = s * (x @ W.T) + (1 - s) * (seen @ W.T)
    centred = seen - seen.mean(0) if bias else seen
    rho = RIDGE * float((centred.square().sum(0) / tokens).mean())
    ones = torch.ones(tokens, 1, dtype=x.dtype) if bias else torch.zeros(tokens, 1, dtype=x.dtype)
    rows = torch.cat([seen @ low.A.T, ones], 1) / tokens**0.5
    pull = rho**0.5 * torch.cat([low.A.T, torch.zeros(N, 1, dtype=x.dtype)], 1)
    wanted = torch.cat([t / tokens**0.5, rho**0.5 * W.T])
    solution = torch.linalg.lstsq(torch.cat([rows, pull]), wanted, driver="gelsd").solution
    torch.testing.assert_close(layer.up.weight.detach(), solution[:K].T, rtol=1e-7, atol=1e-9)
    if bias:
        torch.testing.assert_close(layer.bias.detach(), solution[K] + dense.bias.detach(), rtol=1e-7, atol=1e-9)
    assert torch.equal(layer.down.weight, low.A)


def dense(layers, name="llama-gqa"):
    model = tiny(name)
    del next(m for m in model.modules() if isinstance(m, nn.ModuleList))[layers:]
    model.config.num_hidden_layers = layers
    return model


def healed(model, teacher, **settings):
    return train(ResidentModel(model), ResidentModel(teacher), windows(20, seed=3), "closed-form", **settings)


def weights_off(model, teacher):
    """The blocks' outputs against those of the dense model, on sequences not seen before."""
    ids = windows(6, seed=8).ids
    with torch.no_grad():
        mine, other = (m(input_ids=ids, output_hidden_states=True).hidden_states[1:-1] for m in (model, teacher))
    return sum(float((a - b).square().sum() / b.square().sum()) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-bias", "gpt2-conv1d"])
def test_blocks_come_nearer_without_training(name):
    model, teacher = compressed("low_rank", name, ranks=(6, 8), layers=2), dense(2, name)
    before = weights_off(model, teacher)
    result = healed(model, teacher)
    assert result.after < result.before and weights_off(model, teacher) < before
    for history in result.history:  # group after group, never worse
        assert history["heldout"] == sorted(history["heldout"], reverse=True)


def test_a_basis_that_other_blocks_read_is_left_alone():
    model = across()
    before = model.model.layers[0].self_attn.q_proj.down.weight.detach().clone()
    ups = [layer.self_attn.q_proj.up.weight.detach().clone() for layer in model.model.layers]
    assert healed(model, tiny("llama-gqa")).after <= 1
    assert torch.equal(model.model.layers[0].self_attn.q_proj.down.weight, before)
    assert any(not torch.equal(a, b.self_attn.q_proj.up.weight) for a, b in zip(ups, model.model.layers, strict=True))


def test_what_is_right_already_stays_right():
    model, teacher = compressed("low_rank", ranks=(24,), layers=2), dense(2)
    for name, layer in teacher.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data = weight_of(model.get_submodule(name)).clone()
    assert healed(model, teacher).after < 1e-10 and weights_off(model, teacher) < 1e-8


def test_no_time_is_the_identity():
    model = mixed()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    healed(model, dense(2), schedule=Schedule(minutes=1e-9))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
