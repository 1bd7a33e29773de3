from __future__ import annotations

import pytest
import torch
from linalg_oracles import best, decaying, inputs, loss, randn

from corank.errors import CorankError
from corank.linalg import psd_root, truncate

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 7), (7, 1)]
TALL_AND_WIDE = [(24, 40), (40, 24)]


def rebuilt(t, W, k):
    B, A = t.pair(W, k)
    return B @ A


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("route", ["auto", "output", "input"])
def test_identity_metric_is_the_truncated_svd(shape, route):
    W = randn(*shape)
    t = truncate(W, route=route)
    for k in range(min(shape) + 1):
        assert torch.allclose(rebuilt(t, W, k), best(W, k), atol=1e-10)
    assert torch.allclose(t.energy, torch.linalg.svdvals(W).square(), rtol=1e-10)


def test_scaling_weight_and_metric_leaves_the_subspace():
    W, G = randn(20, 30), inputs(30, 90) @ inputs(30, 90).T
    t, scaled = truncate(W, G), truncate(3.0 * W, 7.0 * G)
    for k in (1, 9, 19):
        assert torch.allclose(t.up[:, :k] @ t.project[:k], scaled.up[:, :k] @ scaled.project[:k], atol=1e-9)
    assert torch.allclose(63.0 * t.energy, scaled.energy, rtol=1e-10)
    assert torch.allclose(truncate(W, 7.0 * torch.eye(30)).energy, 7.0 * truncate(W).energy, rtol=1e-10)


@pytest.mark.parametrize("shape", TALL_AND_WIDE)
@pytest.mark.parametrize("route", ["output", "input"])
def test_predicted_loss_is_the_realised_loss_at_every_rank(shape, route):
    W, X = randn(*shape), inputs(shape[1], 100)
    t = truncate(W, X @ X.T, route=route)
    curve = t.loss()
    assert len(curve) == min(shape) + 1 and curve[-1] == 0.0
    for k in range(len(curve)):
        realised = float(((W - rebuilt(t, W, k)) @ X).square().sum())
        assert realised == pytest.approx(float(curve[k]), rel=1e-10, abs=1e-13 * t.total)
    assert t.total == pytest.approx(float((W @ X).square().sum()), rel=1e-12)


def cholesky_route(W, X, k):
    S = torch.linalg.cholesky(X @ X.T)
    return torch.linalg.solve_triangular(S, best(W @ S, k), upper=False, left=False)


def eigen_root_route(W, X, k):
    values, Q = torch.linalg.eigh(X @ X.T)
    return (best(W @ Q * values.sqrt(), k) / values.sqrt()) @ Q.T


def output_pca_route(W, X, k):
    U = torch.linalg.eigh(W @ X @ X.T @ W.T).eigenvectors.flip(1)[:, :k]
    return U @ U.T @ W


def input_root_route(W, X, k):
    S = psd_root(X @ X.T)
    V = torch.linalg.eigh(S.T @ W.T @ W @ S).eigenvectors.flip(1)[:, :k]
    U = torch.linalg.qr(W @ S @ V).Q
    return U @ U.T @ W


def coala_qr_route(W, X, k):
    T = torch.linalg.qr(X.T).R
    U = torch.linalg.svd(W @ T.T, full_matrices=False)[0][:, :k]
    return U @ U.T @ W


@pytest.mark.parametrize("shape", TALL_AND_WIDE)
@pytest.mark.parametrize(
    "oracle", [cholesky_route, eigen_root_route, output_pca_route, input_root_route, coala_qr_route]
)
def test_all_published_routes_are_one_estimator(shape, oracle):
    W, X = randn(*shape, seed=3), inputs(shape[1], 120, seed=4)
    G = X @ X.T
    t = truncate(W, G)
    for k in (1, 7, 15, 23):
        ours, theirs = rebuilt(t, W, k), oracle(W, X, k)
        assert loss(W, ours, G) == pytest.approx(loss(W, theirs, G), rel=1e-8)
        assert torch.allclose(ours @ X, theirs @ X, atol=1e-8)


@pytest.mark.parametrize("tokens", [5, 17])
def test_routes_agree_on_the_range_of_a_singular_metric(tokens):
    W, X = randn(24, 40), inputs(40, tokens)
    t = truncate(W, X @ X.T)
    for k in (1, 4, tokens):
        assert torch.allclose(rebuilt(t, W, k) @ X, best(W @ X, k), atol=1e-9)
    # The pseudo-inverse form sends unseen directions to zero; the projection keeps a part of W there.
    unseen = torch.eye(40, dtype=torch.float64) - torch.linalg.pinv(X.T) @ X.T
    assert float(((W - rebuilt(t, W, tokens)) @ unseen).norm()) < float((W @ unseen).norm())


@pytest.mark.parametrize("route", ["auto", "output", "input"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["few tokens", "one token", "zero channels", "duplicates", "zero", "regular"])
def test_full_rank_is_lossless_and_orthonormal_whatever_the_statistics(shape, kind, route):
    m, n = shape
    W, X = randn(m, n, seed=5), inputs(n, 3 * n, seed=6)
    if kind == "few tokens":
        X = X[:, : max(1, n // 3)]
    elif kind == "one token":
        X = X[:, :1]
    elif kind == "zero channels":
        X[: n // 2] = 0.0
    elif kind == "duplicates":
        X = X[torch.arange(n) // 2]
    elif kind == "zero":
        X = 0.0 * X
    t = truncate(W, X @ X.T, route=route)
    p = min(m, n)
    assert t.up.shape == (m, p) and t.energy.shape == (p,)
    assert torch.allclose(t.up.T @ t.up, torch.eye(p, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(rebuilt(t, W, p), W, atol=1e-10)
    curve = t.loss()
    rank = int(torch.linalg.matrix_rank(W @ X))
    assert torch.isfinite(curve).all() and (curve[rank:] == 0).all()
    for k in range(p + 1):
        assert loss(W, rebuilt(t, W, k), X @ X.T) == pytest.approx(float(curve[k]), rel=1e-9, abs=1e-12 * t.total)


def test_silent_directions_are_ordered_by_what_they_keep_of_the_weight():
    W, X = randn(20, 30), inputs(30, 4)
    t = truncate(W, X @ X.T)
    kept = (t.project[4:] @ W).square().sum(1)
    assert (kept.diff() <= 1e-10).all()
    remainder = W - rebuilt(t, W, 4)
    assert torch.allclose(kept, torch.linalg.svdvals(remainder)[:16].square(), rtol=1e-8)


@pytest.mark.parametrize("shape", TALL_AND_WIDE)
def test_diagonal_metric_is_the_asvd_formula(shape):
    W, d = randn(*shape), randn(shape[1], seed=1).abs() + 0.1
    t, full = truncate(W, d.square()), truncate(W, torch.diag(d.square()))
    for k in (1, 8, 20):
        assert torch.allclose(rebuilt(t, W, k), best(W * d, k) / d, atol=1e-9)
        assert torch.allclose(rebuilt(t, W, k), rebuilt(full, W, k), atol=1e-9)
    with_zeros = truncate(W, torch.where(torch.arange(shape[1]) < 10, 0.0, d.square()))
    assert torch.isfinite(with_zeros.up).all() and with_zeros.loss()[-1] == 0


@pytest.mark.parametrize("shape", TALL_AND_WIDE)
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_shared_root_stands_for_the_metric(shape, diagonal):
    W, X = randn(*shape), inputs(shape[1], 9)
    G = (X @ X.T).diagonal() if diagonal else X @ X.T
    t, rooted = truncate(W, G), truncate(W, root=psd_root(G))
    assert torch.allclose(t.energy, rooted.energy, atol=1e-12 * t.total)
    for k in (3, 9, 24):
        assert loss(W, rebuilt(t, W, k), G) == pytest.approx(loss(W, rebuilt(rooted, W, k), G), abs=1e-12 * t.total)


def two_sided(W, G, R):
    """Loss curve from the dense definition: discarded squared singular values of R^(1/2) W G^(1/2)."""
    energy = torch.linalg.svdvals(psd_root(R).T @ W @ psd_root(G)).square()
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


@pytest.mark.parametrize("shape", TALL_AND_WIDE + [(32, 32)])
@pytest.mark.parametrize("left_tokens", [3, 11, 200])
@pytest.mark.parametrize("tokens", [6, 200])
def test_two_sided_loss_is_the_discarded_energy(shape, left_tokens, tokens):
    m, n = shape
    W, X, Y = randn(m, n), inputs(n, tokens), inputs(m, left_tokens, seed=9)
    G, R = X @ X.T, Y @ Y.T
    t = truncate(W, G, R=R)
    curve, exact = t.loss(), two_sided(W, G, R)
    assert (
        torch.allclose(curve[: len(exact)], exact, atol=1e-11 * t.total) and (curve[len(exact) :].abs() < 1e-11).all()
    )
    for k in range(t.up.shape[1] + 1):
        assert loss(W, rebuilt(t, W, k), G, R) == pytest.approx(float(curve[k]), abs=1e-10 * t.total)
    eye = torch.eye(t.up.shape[1], dtype=torch.float64)
    assert torch.allclose(t.project @ t.up, eye, atol=1e-7)
    if left_tokens >= m:
        assert torch.allclose(rebuilt(t, W, min(m, n)), W, atol=1e-8)


def test_identity_output_metric_changes_nothing():
    W, X = randn(24, 40), inputs(40, 100)
    plain = truncate(W, X @ X.T)
    for R in (torch.eye(24, dtype=torch.float64), torch.ones(24, dtype=torch.float64)):
        t = truncate(W, X @ X.T, R=R)
        for k in (1, 12, 24):
            assert torch.allclose(rebuilt(t, W, k), rebuilt(plain, W, k), atol=1e-9)


@pytest.mark.parametrize("zeros", [0, 10])
def test_diagonal_output_metric_equals_the_full_one(zeros):
    W, X, d = randn(24, 40), inputs(40, 100), randn(24, seed=2).square() + 0.1
    d[:zeros] = 0.0
    t, full = truncate(W, X @ X.T, R=d), truncate(W, X @ X.T, R=torch.diag(d))
    for k in (1, 8, 14):
        assert torch.allclose(rebuilt(t, W, k), rebuilt(full, W, k), atol=1e-8)


def test_outputs_the_metric_ignores_are_fitted_by_least_squares():
    W, X = randn(24, 40), inputs(40, 100)
    R = torch.zeros(24, dtype=torch.float64)
    R[:6] = 1.0
    t = truncate(W, X @ X.T, R=R)
    assert t.pair(W, 20)[0].shape == (24, 6) and t.loss()[6] == pytest.approx(0.0, abs=1e-10)
    B, A = t.pair(W, 4)
    features = A @ X
    assert torch.allclose(B, W @ X @ features.T @ torch.linalg.inv(features @ features.T), atol=1e-8)


def test_random_factors_never_win():
    W, X = randn(16, 20), inputs(20, 50)
    G, R = X @ X.T, inputs(16, 60, seed=8) @ inputs(16, 60, seed=8).T
    t, two = truncate(W, G), truncate(W, G, R=R)
    for seed in range(20):
        k = 1 + seed % 8
        A = randn(k, 20, seed=seed)
        # Best output factor for this input factor, then a random step: the strongest random competitor.
        B = W @ G @ A.T @ torch.linalg.inv(A @ G @ A.T) + 1e-3 * randn(16, k, seed=seed + 50)
        assert loss(W, B @ A, G) > float(t.loss()[k])
        assert loss(W, B @ A, G, R) > float(two.loss()[k])
        B0, A0 = t.pair(W, k)
        assert loss(W, (B0 + 1e-3 * randn(16, k, seed=seed)) @ A0, G) > float(t.loss()[k])


def test_two_stages_under_one_metric_are_one_stage():
    W, X = randn(24, 40), inputs(40, 100)
    t = truncate(W, X @ X.T)
    staged = rebuilt(t, W, 16)
    again = truncate(staged, X @ X.T)
    assert torch.allclose(rebuilt(again, staged, 6), rebuilt(t, W, 6), atol=1e-9)


def test_removing_the_mean_never_hurts_and_does_nothing_without_one():
    W = randn(24, 40)
    X = inputs(40, 300) + 0.3 * randn(40, 1, seed=7) / 300**0.5
    mean = X.sum(1) / 300**0.5
    centred = truncate(W, X @ X.T - torch.outer(mean, mean)).loss()
    plain = truncate(W, X @ X.T).loss()
    assert (centred <= plain + 1e-12).all() and centred[3] < plain[3]
    zero_mean = X - mean[:, None] / 300**0.5
    remaining = zero_mean.sum(1) / 300**0.5
    G = zero_mean @ zero_mean.T
    assert torch.allclose(truncate(W, G - torch.outer(remaining, remaining)).loss(), truncate(W, G).loss(), atol=1e-10)


def test_rank_keeps_the_leading_vectors_and_all_energies():
    W, X = randn(24, 40), inputs(40, 100)
    t, short = truncate(W, X @ X.T), truncate(W, X @ X.T, rank=5)
    assert short.up.shape == (24, 5) and short.project.shape == (5, 24)
    assert torch.equal(short.energy, t.energy) and torch.equal(short.loss(), t.loss())
    assert torch.allclose(rebuilt(short, W, 5), rebuilt(t, W, 5), atol=1e-12)
    zero = truncate(W, X @ X.T, rank=0)
    assert torch.equal(rebuilt(zero, W, 0), torch.zeros_like(W)) and float(zero.loss()[0]) == zero.total
    with pytest.raises(CorankError, match="rank must be between 0 and 5"):
        short.pair(W, 6)
    for k in (-1, 25):
        with pytest.raises(CorankError, match="rank must be between 0 and 24"):
            t.pair(W, k)


@pytest.mark.parametrize("shape", TALL_AND_WIDE)
@pytest.mark.parametrize("rooted", [False, True])
def test_randomized_route_finds_the_leading_subspace(shape, rooted):
    W, X = decaying(*shape, rate=2.0), inputs(shape[1], 100)
    metric = {"root": psd_root(X @ X.T)} if rooted else {"G": X @ X.T}
    exact = truncate(W, X @ X.T)
    g = torch.Generator().manual_seed(1)
    t = truncate(W, **metric, rank=4, route="randomized", generator=g)
    assert t.up.shape == (shape[0], 4) and len(t.loss()) == 5
    for k in range(5):
        realised = loss(W, rebuilt(t, W, k), X @ X.T)
        assert realised == pytest.approx(float(t.loss()[k]), rel=1e-9)
        assert realised <= 1.01 * float(exact.loss()[k])
    again = truncate(W, **metric, rank=4, route="randomized", generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.up, t.up)


@pytest.mark.parametrize("shape", [(96, 96), (144, 96), (96, 160)])
@pytest.mark.parametrize("decay", [0.3, 1.0])
def test_mixed_precision_is_within_a_thousandth(shape, decay):
    W, X = randn(*shape).float(), inputs(shape[1], 800, decay=decay)
    G, W64 = X @ X.T, W.double()
    exact, t = truncate(W64, G), truncate(W, G, precision="mixed")
    assert t.up.dtype == t.project.dtype == torch.float32 and t.energy.dtype == torch.float64
    U = torch.linalg.qr(t.up.double()).Q
    assert float((U.abs() - t.up.double().abs()).abs().max()) < 1e-5
    for k in range(min(shape)):
        best_loss = float(exact.loss()[k])
        if best_loss > 1e-4 * exact.total:
            realised = loss(W64, U[:, :k] @ (U[:, :k].T @ W64), G)
            assert realised == pytest.approx(best_loss, rel=1e-3)
            assert float(t.loss()[k]) == pytest.approx(best_loss, rel=1e-3)


def test_mixed_precision_repairs_what_float32_cannot_resolve(monkeypatch):
    from corank.linalg import truncation

    # Energies fall from 1 to 1e-9: float32 alone is blind to the last third of them.
    m = 96
    U = torch.linalg.qr(randn(m, m, seed=1)).Q
    V = torch.linalg.qr(randn(m, m, seed=2)).Q
    sigma = torch.cat([torch.ones(64), torch.logspace(-2, -4.5, 32)]).double()
    W = U * sigma @ V.T
    exact, t = truncate(W), truncate(W, precision="mixed")
    for k in (64, 70, 80):
        realised = loss(W, rebuilt(t, W, k))
        assert realised == pytest.approx(float(exact.loss()[k]), rel=1e-3)
        assert realised == pytest.approx(float(t.loss()[k]), rel=1e-2)
    monkeypatch.setattr(truncation, "RESOLVED", 0.0)
    blind = truncate(W, precision="mixed")
    assert loss(W, rebuilt(blind, W, 80)) > 1.01 * float(exact.loss()[80])


@pytest.mark.parametrize("shape", [(96, 96), (144, 96), (96, 160)])
def test_mixed_precision_with_a_rank_needs_to_resolve_only_that_much(shape):
    W, X = randn(*shape).float(), inputs(shape[1], 800, decay=1.0)
    G, W64 = X @ X.T, W.double()
    exact, t = truncate(W64, G), truncate(W, G, precision="mixed", rank=30)
    assert t.up.shape[1] == 30 and len(t.energy) == min(shape)
    U = torch.linalg.qr(t.up.double()).Q
    for k in (1, 10, 30):
        realised = loss(W64, U[:, :k] @ (U[:, :k].T @ W64), G)
        assert realised == pytest.approx(float(exact.loss()[k]), rel=1e-3)
        assert float(t.loss()[k]) == pytest.approx(float(exact.loss()[k]), rel=1e-3)


def test_mixed_precision_gives_way_to_double_when_float32_is_hopeless():
    W = torch.diag(torch.logspace(0, -12, 40, dtype=torch.float64)) @ torch.linalg.qr(randn(40, 40)).Q
    assert torch.equal(truncate(W, precision="mixed").up, truncate(W).up)


@pytest.mark.parametrize("precision", ["double", "mixed"])
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_extreme_scales_do_not_overflow(precision, scale):
    W, G = randn(32, 32), 1e12 * inputs(32, 99) @ inputs(32, 99).T
    t = truncate(scale * W, G / scale, precision=precision)
    assert torch.isfinite(t.up).all() and torch.isfinite(t.energy).all()
    assert torch.allclose(t.energy / scale, truncate(W, G).energy, rtol=1e-3, atol=1e-9 * t.total / scale)


def test_float32_input_is_within_a_thousandth_of_float64():
    W, X = randn(48, 64), inputs(64, 500)
    G = X @ X.T
    exact, t = truncate(W, G), truncate(W.float(), G.float())
    assert t.up.dtype == torch.float32
    for k in (4, 16, 32, 44):
        realised = loss(W, rebuilt(t, W.float(), k).double(), G)
        assert realised == pytest.approx(float(exact.loss()[k]), rel=1e-3)


def test_half_precision_weights_come_back_as_float32():
    W = randn(8, 8).bfloat16()
    t = truncate(W)
    assert t.up.dtype == torch.float32
    assert torch.allclose(rebuilt(t, W, 8), W.float(), atol=1e-5)


def test_repeated_calls_are_identical():
    W, X = randn(24, 40), inputs(40, 100)
    for precision in ("double", "mixed"):
        one, two = (truncate(W, X @ X.T, precision=precision) for _ in range(2))
        assert torch.equal(one.up, two.up) and torch.equal(one.energy, two.energy)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"W": torch.ones(3)}, "2-D"),
        ({"W": torch.ones(3, 4, dtype=torch.int64)}, "floating point"),
        ({"W": torch.full((3, 4), float("nan"))}, "NaN"),
        ({"W": torch.ones(3, 4), "G": torch.eye(3)}, r"G must have shape \[4, 4\]"),
        ({"W": torch.ones(3, 4), "G": -torch.ones(4)}, "negative diagonal"),
        ({"W": torch.ones(3, 4), "R": torch.eye(4)}, r"R must have shape \[3, 3\]"),
        ({"W": torch.ones(3, 4), "root": torch.eye(3)}, "root must be"),
        ({"W": torch.ones(3, 4), "rank": 4}, "rank must be between 0 and 3"),
        ({"W": torch.ones(3, 4), "precision": "duoble"}, "nearest: double"),
        ({"W": torch.ones(3, 4), "route": "ouput"}, "nearest: output"),
        ({"W": torch.ones(3, 4), "route": "randomized"}, "needs a rank"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(CorankError, match=sentence):
        truncate(**arguments)


@pytest.mark.parametrize("shape", TALL_AND_WIDE)
@pytest.mark.parametrize("precision", ["double", "mixed"])
def test_two_sided_float32_weights_lose_what_float64_ones_lose(shape, precision):
    m, n = shape
    W, X, Y = randn(m, n), inputs(n, 200), inputs(m, 200, seed=9)
    G, R = X @ X.T, Y @ Y.T
    exact = truncate(W, G, R=R).loss()
    t = truncate(W.float(), G, R=R, precision=precision)
    for k in (1, min(m, n) // 2):
        B, A = t.pair(W.float(), k)
        assert B.dtype == A.dtype == torch.float32
        assert loss(W, (B @ A).double(), G, R) == pytest.approx(float(exact[k]), rel=1e-3)
