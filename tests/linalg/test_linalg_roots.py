from __future__ import annotations

import pytest
import torch
from linalg_oracles import inputs, loss, randn

from corank.errors import CorankError
from corank.linalg import apply_root, psd_root, psd_sqrt, refit_input, refit_output, retarget, truncate
from corank.linalg.roots import Metric, lower_product, solve_psd


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_root_reproduces_the_metric_at_its_rank(tokens):
    X = inputs(30, tokens)
    G = X @ X.T
    S = psd_root(G)
    assert S.shape == (30, min(tokens, 30))
    assert torch.allclose(S @ S.T, G, atol=1e-12 * float(G.trace()))
    assert (S.norm(dim=0).diff() <= 0).all()
    root = psd_sqrt(G)
    assert torch.allclose(root, root.T, atol=1e-12) and torch.allclose(root @ root, G, atol=1e-11)


def test_root_of_zero_channels_duplicates_and_nothing():
    X = inputs(30, 100)
    X[3], X[4] = 0.0, X[5]
    S = psd_root(X @ X.T)
    assert S.shape[1] == 28 and torch.allclose(S @ S.T, X @ X.T, atol=1e-11)
    assert psd_root(torch.zeros(4, 4)).shape == (4, 0)
    assert psd_sqrt(torch.zeros(4, 4)).abs().max() == 0


def test_diagonal_root_stays_a_vector():
    d = torch.tensor([4.0, 0.0, 9.0, -1e-12])
    assert torch.equal(psd_root(d), torch.tensor([2.0, 0.0, 3.0, 0.0]))
    assert torch.equal(psd_sqrt(d), psd_root(d))
    W = randn(2, 4).float()
    assert torch.equal(apply_root(W, psd_root(d)), W @ torch.diag(psd_root(d)))


def test_root_keeps_the_dtype_and_refuses_nonsense():
    assert psd_root(torch.eye(3)).dtype == torch.float32
    with pytest.raises(CorankError, match="must have shape"):
        psd_root(torch.ones(3, 4))
    with pytest.raises(CorankError, match="NaN"):
        psd_root(torch.full((2, 2), float("inf")))
    with pytest.raises(CorankError, match="negative diagonal"):
        psd_root(-torch.eye(3))


@pytest.mark.parametrize("tokens", [5, 200])
def test_every_form_of_a_metric_weighs_alike(tokens):
    X, A, Z = inputs(12, tokens), randn(4, 12), randn(4, 3)
    G = X @ X.T
    forms = [Metric.of(G, None, 12), Metric.of(None, psd_root(G), 12)]
    diagonal = [Metric.of(G.diagonal(), None, 12), Metric.of(None, G.diagonal().sqrt(), 12)]
    for group, full in (
        (forms, G),
        (diagonal, torch.diag(G.diagonal())),
        ([Metric()], torch.eye(12).double()),
    ):
        for form in group:
            assert torch.allclose(form.weigh(A), A @ full)
            assert torch.allclose(form.moment(A).tril(), (A @ full @ A.T).tril())
            assert torch.allclose(form.rooted(A) @ form.rooted(A).T, A @ full @ A.T)
            assert torch.allclose(form.times(A, Z), A @ full @ A.T @ Z)
            assert form.total(A) == pytest.approx(float((A @ full @ A.T).trace()))
            single, factor = form.single()
            assert torch.allclose(single.moment(A.float()).double() * factor, form.moment(A), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200, 257])
def test_lower_product_is_the_lower_triangle(size):
    A = randn(size, 5)
    found = lower_product(A, 2.0 * A)
    assert torch.isfinite(found).all() and torch.allclose(found.tril(), (2.0 * A @ A.T).tril(), atol=1e-12)


@pytest.mark.parametrize("rank", [0, 3, 10])
def test_solve_with_a_singular_matrix_is_least_squares(rank):
    X = randn(10, rank) * torch.logspace(3, -3, 10, dtype=torch.float64)[:, None]
    K, Y = X @ X.T, X @ randn(rank, 4, seed=1)
    solution = solve_psd(K, Y)
    assert torch.isfinite(solution).all()
    assert torch.allclose(K @ solution, Y, atol=1e-8 * float(Y.abs().max()) if rank else 0.0)
    assert solve_psd(torch.zeros(0, 0), torch.zeros(0, 2)).shape == (0, 2)


def streams(n=20, tokens=200):
    X = inputs(n, tokens)
    drifted = X + 0.3 * inputs(n, tokens, seed=5)
    return X, drifted


def test_retarget_is_the_published_formula():
    X, D = streams()
    W, C, H = randn(8, 20), X @ D.T, D @ D.T
    for mix, ridge in ((1.0, 1e-3), (0.25, 1e-1), (0.0, 1e-3), (1.0, 0.0)):
        rho = ridge * float(H.diagonal().mean())
        eye = torch.eye(20, dtype=torch.float64)
        direct = (W @ ((1 - mix) * H + mix * C) + rho * W) @ torch.linalg.inv(H + rho * eye)
        assert torch.allclose(retarget(W, C, H, mix, ridge), direct, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 7, 200])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_retarget_without_drift_is_exactly_the_identity(tokens, ridge):
    X, _ = streams(tokens=tokens)
    W = randn(8, 20)
    assert torch.equal(retarget(W, X @ X.T, X @ X.T, ridge=ridge), W)
    assert torch.equal(retarget(W.float(), X @ X.T, X @ X.T), W.float())


@pytest.mark.parametrize("tokens", [7, 200])
def test_anchored_truncation_beats_plain_and_shift_aware_and_its_loss_is_known(tokens):
    X, D = streams(tokens=tokens)
    W, C, H = randn(8, 20), X @ D.T, D @ D.T
    target = retarget(W, C, H, ridge=0.0)
    residual = (W @ X - target @ D).square().sum()
    assert torch.allclose(target @ H, W @ C, atol=1e-9)  # normal equations, singular H included
    for k in (1, 3, 6):
        t, losses = truncate(target, H), []
        for weight, metric in ((target, H), (W, X @ X.T), (W, H)):
            B, A = truncate(weight, metric).pair(weight, k)
            losses.append(float((W @ X - B @ A @ D).square().sum()))
        assert losses[0] <= losses[1] + 1e-10 and losses[0] <= losses[2] + 1e-10
        assert losses[0] == pytest.approx(float(residual + t.loss()[k]), rel=1e-8)


def test_diagonal_moments_retarget_like_full_ones():
    c, h = randn(9, seed=1).abs(), randn(9, seed=2).abs()
    h[0] = c[0] = 0.0
    W = randn(4, 9)
    full = retarget(W, torch.diag(c), torch.diag(h))
    assert torch.allclose(retarget(W, c, h), full, atol=1e-12)
    assert torch.equal(retarget(W, c, h, ridge=0.0)[:, 0], W[:, 0])


@pytest.mark.parametrize("tokens", [4, 200])
def test_refits_are_stationary_and_improve(tokens):
    X, D = streams(tokens=tokens)
    W, T_cross, H = randn(8, 20), randn(8, 20) @ X @ D.T, D @ D.T
    B, A = truncate(W, H).pair(W, 3)
    better = refit_output(T_cross, A, H)
    assert torch.allclose((T_cross - better @ A @ H) @ A.T, torch.zeros(8, 3).double(), atol=1e-9)
    rho = 1e-3 * float(H.diagonal().mean())
    inner = refit_input(B, T_cross, H, W)
    gradient = B.T @ (B @ inner @ H - T_cross) + rho * B.T @ (B @ inner - W)
    assert torch.allclose(gradient, torch.zeros(3, 20).double(), atol=1e-9)
    undamped = refit_input(B, T_cross, H, W, ridge=0.0)
    assert torch.allclose(B.T @ (B @ undamped @ H - T_cross), torch.zeros(3, 20).double(), atol=1e-8)
    assert torch.allclose(refit_output(T_cross, A, H.diagonal()), refit_output(T_cross, A, torch.diag(H.diagonal())))


def test_alternating_refits_reach_the_optimum():
    X, D = streams()
    W, C, H = randn(8, 20), X @ D.T, D @ D.T
    B, A = randn(8, 3, seed=1), randn(3, 20, seed=2)
    for _ in range(200):
        B = refit_output(W @ C, A, H)
        A = refit_input(B, W @ C, H, W, ridge=0.0)
    target = retarget(W, C, H, ridge=0.0)
    assert loss(target, B @ A, H) == pytest.approx(float(truncate(target, H).loss()[3]), rel=1e-6)


def test_retarget_refuses_what_does_not_fit():
    W = randn(4, 5)
    with pytest.raises(CorankError, match="shape of H"):
        retarget(W, torch.eye(4), torch.eye(5))
    with pytest.raises(CorankError, match="ridge must be >= 0"):
        retarget(W, torch.eye(5), torch.eye(5), ridge=-1.0)
