from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg.interpolative as interpolative
import torch
from linalg_oracles import decaying, inputs, loss, randn

from corank.errors import CorankError
from corank.linalg import (
    column_curve,
    column_id,
    cur_curve,
    link,
    plain_link,
    project_left,
    project_right,
    psd_root,
    row_curve,
    row_id,
    select,
    truncate,
)
from corank.linalg.cur import nested_qr

M, N, R = 24, 36, 10


def problem(kind="full", tokens=200, seed=0):
    W, X = decaying(M, N, 0.5, seed), inputs(N, tokens, seed)
    G = {"none": None, "diagonal": (X @ X.T).diagonal(), "full": X @ X.T}[kind]
    I, J = select(W, R, "qdeim", axis=0), select(W, R, "qdeim")
    return W, G, I, J


def square(G):
    if G is None:
        return torch.eye(N, dtype=torch.float64)
    return torch.diag(G) if G.ndim == 1 else G


def root_of(G):
    return None if G is None else psd_root(G)


@pytest.mark.parametrize("rank", [3, 8])
def test_nested_qr_spans_every_leading_block_also_when_columns_depend(rank):
    C = randn(20, rank) @ randn(rank, 12, seed=1)
    C[:, 2] = 0.0
    C[:, 5] = C[:, 1]
    Q, T, kept = nested_qr(C)
    assert torch.allclose(Q @ T, C, atol=1e-10) and (T.tril(-1) == 0).all()
    assert torch.allclose(Q.T @ Q, torch.diag(kept.double()), atol=1e-12)
    for k in range(13):
        exact = torch.linalg.matrix_rank(C[:, :k], rtol=1e-10) if k else 0
        assert int(kept[:k].sum()) == exact
        assert torch.allclose(Q[:, :k] @ (Q[:, :k].T @ C[:, :k]), C[:, :k], atol=1e-10)
    unit = torch.eye(4, dtype=torch.float64)[:, [0, 0, 1, 1, 2]]
    assert nested_qr(unit)[2].tolist() == [True, False, True, False, True]
    assert int(nested_qr(randn(3, 5))[2].sum()) == 3


def test_scale_of_a_column_does_not_decide_whether_it_counts():
    C = randn(20, 6) * torch.tensor([1.0, 1e-20, 1.0, 1e-18, 1.0, 1e9]).double()
    assert nested_qr(C)[2].all()


def test_left_projection_is_least_squares():
    C, W = randn(M, 5), randn(M, N, seed=1)
    assert torch.allclose(project_left(C, W), torch.linalg.lstsq(C, W).solution, atol=1e-10)
    C[:, 3], C[:, 4] = C[:, 0], 0.0
    T = project_left(C, W)
    assert torch.isfinite(T).all() and torch.allclose(C @ T, C @ torch.linalg.pinv(C) @ W, atol=1e-10)


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_right_projection_is_the_weighted_formula(kind):
    W, G, I, _ = problem(kind)
    A, H = W[I], square(G)
    direct = W @ H @ A.T @ torch.linalg.inv(A @ H @ A.T)
    assert torch.allclose(project_right(W, A, G), direct, atol=1e-7)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_right_projection_under_a_singular_metric_is_optimal_and_moderate(kind):
    W, _, I, _ = problem()
    X = inputs(N, 4)
    G = X @ X.T if kind == "full" else torch.where(torch.arange(N) < 4, 1.0, 0.0).double()
    A = W[I]
    Z = project_right(W, A, G)
    assert torch.allclose((W - Z @ A) @ square(G) @ A.T, torch.zeros(M, R).double(), atol=1e-9)
    assert loss(W, Z @ A, G) < 1e-16 and Z.norm() < 100 * project_right(W, A).norm()


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_weighted_link_is_stationary_and_any_step_is_worse(kind):
    W, G, I, J = problem(kind)
    C, A, H = W[:, J], W[I], square(G)
    best = link(C, W, A, G)
    gradient = C.T @ (W - C @ best @ A) @ H @ A.T
    assert float(gradient.abs().max()) < 1e-9 * float((C.T @ W @ H @ A.T).abs().max())
    least = loss(W, C @ best @ A, G)
    for seed in range(10):
        assert loss(W, C @ (best + 1e-2 * randn(R, R, seed=seed)) @ A, G) > least
    plain = plain_link(C, W, A)
    assert torch.allclose(plain, torch.linalg.pinv(C) @ W @ torch.linalg.pinv(A), atol=1e-8)
    if kind == "none":
        assert torch.allclose(best, plain, atol=1e-10)
        assert torch.allclose(link(C, W, A, 5.0 * torch.ones(N).double()), plain, atol=1e-8)
    else:
        assert loss(W, C @ plain @ A, G) > least


def test_curing_diagonal_link_formula():
    W, d, I, J = problem("diagonal")
    C, A, D = W[:, J], W[I], d.sqrt()
    assert torch.allclose(link(C, W, A, d), torch.linalg.pinv(C) @ (W * D) @ torch.linalg.pinv(A * D), atol=1e-7)


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_interpolation_has_exact_identity_blocks_and_exact_outputs(kind):
    W, G, I, J = problem(kind)
    T, Z = column_id(W, J), row_id(W, I, G)
    eye = torch.eye(R, dtype=torch.float64)
    assert torch.equal(T[:, J], eye) and torch.equal(Z[I], eye)
    assert torch.equal((Z @ W[I])[I], W[I]) and torch.equal((W[:, J] @ T)[:, J], W[:, J])
    single = row_id(W.float(), I, G)
    assert single.dtype == torch.float32 and torch.equal(single[I], eye.float())


def test_column_coefficients_are_optimal_for_every_metric():
    W, G, _, J = problem()
    C = W[:, J]
    gradient = C.T @ (W - C @ column_id(W, J)) @ G
    assert float(gradient.abs().max()) < 1e-10


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
@pytest.mark.parametrize("how", ["deim", "qdeim", "norm", "random", "sketch"])
def test_exact_at_low_rank_for_any_good_selection(kind, how):
    _, G, _, _ = problem(kind)
    W = randn(M, 6) @ randn(6, N, seed=1)
    I, J = select(W, 8, how, axis=0), select(W, 8, how)
    C, A = W[:, J], W[I]
    for approximation in (
        C @ column_id(W, J),
        row_id(W, I, G) @ A,
        C @ link(C, W, A, G) @ A,
        C @ plain_link(C, W, A) @ A,
    ):
        assert torch.allclose(approximation, W, atol=1e-8)


def test_full_size_selection_is_lossless():
    W, G, _, _ = problem()
    I, J = torch.randperm(M), torch.arange(N)[:M]
    C, A = W[:, J], W[I]
    for approximation in (C @ column_id(W, J), row_id(W, I, G) @ A, C @ link(C, W, A, G) @ A):
        assert torch.allclose(approximation, W, atol=1e-7)


def approximations(W, I, J, G, k):
    C, A = W[:, J[:k]], W[I[:k]]
    return {
        "column": C @ column_id(W, J[:k]),
        "row": row_id(W, I[:k], G) @ A,
        "weighted": C @ link(C, W, A, G) @ A,
        "plain": C @ plain_link(C, W, A) @ A,
    }


def curves(W, I, J, G, root=None):
    return {
        "column": column_curve(W, J, G, root=root),
        "row": row_curve(W, I, G, root=root),
        "weighted": cur_curve(W, I, J, G, True, root=root),
        "plain": cur_curve(W, I, J, G, False, root=root),
    }


def degenerate(case):
    W, G, I, J = problem("full", tokens=3 if case == "few tokens" else 200)
    if case == "low rank":
        W = randn(M, 4) @ randn(4, N, seed=1)
    elif case == "duplicates":
        W[I[3]], W[:, J[4]] = W[I[0]], W[:, J[1]]
        W[I[5]], W[:, J[6]] = 0.0, 0.0
    elif case == "zero channels":
        G[: N // 2], G[:, : N // 2] = 0.0, 0.0
    elif case == "zero metric":
        G = 0.0 * G
    elif case == "zero weight":
        W = 0.0 * W
    return W, G, I, J


CASES = ["regular", "few tokens", "low rank", "duplicates", "zero channels", "zero metric", "zero weight"]


@pytest.mark.parametrize("case", CASES)
def test_curves_are_the_realised_losses_at_every_rank(case):
    W, G, I, J = degenerate(case)
    scale = max(float((W @ G * W).sum()), 1e-30)
    for metric in (G, G.diagonal(), None):
        for root in (None, root_of(metric)):
            if root is not None and metric is None:
                continue
            found = curves(W, I, J, None if root is not None else metric, root)
            for name, curve in found.items():
                assert curve.dtype == torch.float64 and curve.shape == (R + 1,)
                assert torch.isfinite(curve).all() and (curve >= 0).all()
                if name != "plain":
                    assert (curve.diff() <= 1e-12 * curve[0] + 1e-30).all()
            for k in range(R + 1):
                for name, approximation in approximations(W, I, J, metric, k).items():
                    realised = loss(W, approximation, metric)
                    total = max(float(found[name][0]), 1e-30)
                    assert realised == pytest.approx(float(found[name][k]), rel=1e-7, abs=1e-11 * total + 1e-14 * scale)


def test_order_of_the_family():
    W, G, I, J = problem()
    svd, found = truncate(W, G).loss()[: R + 1], curves(W, I, J, G)
    slack = 1e-10 * float(svd[0])
    assert (svd <= found["column"] + slack).all() and (svd <= found["row"] + slack).all()
    assert (found["column"] <= found["weighted"] + slack).all() and (found["row"] <= found["weighted"] + slack).all()
    assert (found["weighted"] <= found["plain"] + slack).all()
    # The Without a metric CUR obeys the DEIM bound (Sorensen and Embree, theorem 4.1).
    basis = truncate(W)
    U, V, sigma = basis.up[:, :R], truncate(W.T).up[:, :R], basis.energy.sqrt()
    I, J = select(W, R, axis=0), select(W, R)
    C, A = W[:, J], W[I]
    error = torch.linalg.matrix_norm(W - C @ link(C, W, A) @ A, 2)
    bound = sum(torch.linalg.matrix_norm(torch.linalg.inv(b), 2) for b in (U[I], V[J])) * sigma[R]
    assert sigma[R] * (1 - 1e-12) <= error <= bound


def test_nested_curve_equals_the_curve_of_the_shorter_selection():
    W, G, I, J = problem()
    for k in (1, 4, 9):
        short = curves(W, I[:k], J[:k], G)
        for name, curve in curves(W, I, J, G).items():
            assert torch.allclose(curve[: k + 1], short[name], rtol=1e-9, atol=1e-12)


def test_scipy_interpolative_is_reproduced():
    W = decaying(30, 40, 1.0)
    index, projection = interpolative.interp_decomp(W.numpy().copy(), 12, rand=False)
    skeleton = interpolative.reconstruct_skel_matrix(W.numpy(), 12, index)
    theirs = interpolative.reconstruct_matrix_from_id(skeleton, index, projection)
    J = select(W, 12, "qr")
    assert J.tolist() == index[:12].tolist()
    np.testing.assert_allclose((W[:, J] @ column_id(W, J)).numpy(), theirs, atol=1e-10)
    assert float(column_curve(W, J)[12]) == pytest.approx(float(np.square(W.numpy() - theirs).sum()), rel=1e-8)


def test_float32_is_within_a_thousandth():
    W, G, I, J = problem()
    for name, approximation in approximations(W.float(), I, J, G.float(), R).items():
        assert approximation.dtype == torch.float32
        exact = float(curves(W, I, J, G)[name][R])
        assert loss(W, approximation.double(), G) == pytest.approx(exact, rel=1e-3)


def test_bad_indices_are_refused():
    W, G, I, J = problem()
    for bad, sentence in (
        (torch.tensor([0, 0]), "distinct"),
        (torch.tensor([99]), "between"),
        (torch.ones(2), "integer"),
    ):
        for call in (lambda b: column_id(W, b), lambda b: row_id(W, b), lambda b: row_curve(W, b, G)):
            with pytest.raises(CorankError, match=sentence):
                call(bad)
    with pytest.raises(CorankError, match="as many rows"):
        cur_curve(W, I[:3], J, G)
    with pytest.raises(CorankError, match="number of rows"):
        project_left(randn(3, 2), W)
    with pytest.raises(CorankError, match="number of columns"):
        project_right(W, randn(2, 3))


def test_nothing_given_is_modified():
    W, G, I, J = problem()
    W[I[3]], W[:, J[4]] = W[I[0]], W[:, J[1]]
    before = [t.clone() for t in (W, G, I, J)]
    curves(W, I, J, G)
    curves(W, I, J, None, psd_root(G))
    approximations(W, I, J, G, R)
    truncate(W, G, R=torch.eye(M).double(), precision="mixed")
    assert all(torch.equal(a, b) for a, b in zip((W, G, I, J), before, strict=True))
