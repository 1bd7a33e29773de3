from __future__ import annotations

import pytest
import scipy.linalg.interpolative as interpolative
import torch
from linalg_oracles import decaying, loss, randn

from corank.errors import CorankError
from corank.linalg import SELECTORS, project_left, range_finder, select, sketch, truncate
from corank.linalg.selection import lu_pivots, maxvol


def textbook_deim(V):
    """Sorensen and Embree, algorithm 1: the largest residual of interpolating the next vector."""
    chosen = [int(V[:, 0].abs().argmax())]
    for k in range(1, V.shape[1]):
        coefficients = torch.linalg.solve(V[chosen, :k], V[chosen, k])
        chosen.append(int((V[:, k] - V[:, :k] @ coefficients).abs().argmax()))
    return chosen


def reference_curing(V, version):
    """The loop of the reference code: only the newest row is 'interpolated', by its pseudo-inverse."""
    V, chosen = V.clone(), []
    for i in range(V.shape[1]):
        order = torch.sort(V[:, i].abs(), descending=True).indices.tolist()
        p = next(j for j in order if j not in chosen)
        chosen.append(p)
        if i + 1 < V.shape[1]:
            if version == 1:
                V[:, i + 1 :] -= (
                    V[:, : i + 1] @ torch.linalg.pinv(V[p : p + 1, : i + 1]) @ V[p : p + 1, i + 1 :].clone()
                )
            else:
                row = V[p, : i + 1]
                V[:, i + 1 :] -= (V[:, : i + 1] @ row)[:, None] / (row @ row)
    return chosen


@pytest.mark.parametrize("how", SELECTORS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (20, 20)])
def test_every_rule_selects_distinct_indices_at_every_size(how, axis, shape):
    A = decaying(*shape)
    for r in (0, 1, 7, min(shape)):
        chosen = select(A, r, how, axis=axis)
        assert chosen.dtype == torch.long and chosen.shape == (r,)
        assert len(chosen.unique()) == r
        assert r == 0 or (0 <= int(chosen.min()) and int(chosen.max()) < shape[axis])


@pytest.mark.parametrize("how", SELECTORS)
def test_rows_are_the_columns_of_the_transpose(how):
    A = decaying(30, 44)
    assert torch.equal(select(A, 9, how, axis=0), select(A.T, 9, how, axis=1))


@pytest.mark.parametrize("how", SELECTORS)
@pytest.mark.parametrize("degenerate", ["zero", "rank one", "duplicates", "one nonzero"])
def test_degenerate_matrices_still_give_distinct_indices(how, degenerate):
    A = randn(16, 24)
    if degenerate == "zero":
        A = 0.0 * A
    elif degenerate == "rank one":
        A = torch.outer(A[:, 0], A[0])
    elif degenerate == "duplicates":
        A = A[:, torch.arange(24) // 4]
    else:
        A = torch.zeros_like(A)
        A[3, 5] = 1.0
    chosen = select(A, 10, how)
    assert len(chosen.unique()) == 10
    if degenerate == "one nonzero" and how != "random":
        assert 5 in chosen


@pytest.mark.parametrize("axis", [0, 1])
def test_deim_is_lu_is_the_textbook_loop(axis):
    A = decaying(60, 45)
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    basis = (Vh.T if axis else U)[:, :20]
    expected = textbook_deim(basis)
    assert select(A, 20, "deim", axis=axis).tolist() == expected
    assert select(A, 20, "deim", axis=axis, basis=basis).tolist() == expected
    assert lu_pivots(basis).tolist() == expected


@pytest.mark.parametrize("version", [1, 2])
def test_curing_loops_are_the_reference_ones_and_not_deim(version):
    A = decaying(60, 45)
    V = truncate(A.T).up[:, :20]
    chosen = select(A, 20, f"curing-v{version}", basis=V).tolist()
    assert chosen == reference_curing(V, version)
    assert chosen != textbook_deim(V)


@pytest.mark.parametrize("how", ["deim", "qr", "curing-v1", "curing-v2", "norm", "leverage"])
def test_nested_rules(how):
    A = decaying(40, 50)
    basis = truncate(A.T, rank=20).up
    longest = select(A, 20, how, basis=basis)
    for k in (1, 5, 13):
        assert torch.equal(select(A, k, how, basis=basis), longest[:k])


def test_qdeim_depends_on_the_subspace_only():
    A = decaying(40, 60)
    V = truncate(A.T, rank=12).up
    rotation = torch.linalg.qr(randn(12, 12, seed=3)).Q
    assert torch.equal(select(A, 12, "qdeim", basis=V), select(A, 12, "qdeim", basis=V @ rotation))
    assert not torch.equal(select(A, 12, "deim", basis=V), select(A, 12, "deim", basis=V @ rotation))


def test_norm_and_leverage_are_what_they_say():
    A = randn(20, 30)
    V = torch.linalg.svd(A)[2].T[:, :6]
    assert torch.equal(select(A, 5, "norm"), A.norm(dim=0).sort(descending=True).indices[:5])
    assert torch.equal(select(A, 6, "leverage"), V.norm(dim=1).sort(descending=True).indices[:6])


def test_maxvol_leaves_no_large_coefficient_and_never_loses_volume():
    V = torch.linalg.qr(randn(80, 12)).Q
    start = torch.arange(12)
    rows, F = maxvol(V, start)
    assert float(F.abs().max()) <= 1.05 + 1e-9
    assert torch.equal(F[rows], torch.eye(12, dtype=torch.float64))
    assert torch.allclose(F @ V[rows], V, atol=1e-10)
    assert torch.linalg.det(V[rows]).abs() >= torch.linalg.det(V[start]).abs()
    kept, _ = maxvol(V, start, max_swaps=0)
    assert torch.equal(kept, start)
    chosen = select(decaying(50, 80), 12, "maxvol")
    basis = truncate(decaying(50, 80).T, rank=12).up
    assert float((basis @ torch.linalg.inv(basis[chosen])).abs().max()) <= 1.05 + 1e-9


@pytest.mark.parametrize("how", ["deim", "qdeim", "qr", "maxvol", "sketch"])
def test_exact_rank_is_captured(how):
    A = randn(40, 9) @ randn(9, 60, seed=1)
    C = A[:, select(A, 9, how)]
    assert loss(A, C @ project_left(C, A)) < 1e-18 * float(A.square().sum())


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_good_rules_stay_near_the_svd_and_ahead_of_scipy_and_chance(rate):
    A, r = decaying(120, 160, rate), 20
    optimum = float(truncate(A).loss()[r]) ** 0.5
    index, _ = interpolative.interp_decomp(A.numpy().copy(), r, rand=False)
    errors = {}
    for name, J in [(how, select(A, r, how)) for how in SELECTORS] + [("scipy", torch.tensor(index[:r]))]:
        C = A[:, J]
        errors[name] = loss(A, C @ project_left(C, A)) ** 0.5
    for how in ("deim", "qdeim", "qr", "maxvol"):
        assert optimum <= errors[how] <= 1.25 * errors["scipy"]
    assert errors["sketch"] <= 1.3 * errors["qdeim"]
    assert errors["qdeim"] < errors["random"]
    assert errors["qr"] == pytest.approx(errors["scipy"], rel=1e-9)


@pytest.mark.parametrize("how", ["sketch", "random"])
def test_random_rules_follow_the_generator(how):
    A = decaying(30, 300)
    seed = torch.Generator().manual_seed
    assert torch.equal(select(A, 8, how, generator=seed(1)), select(A, 8, how, generator=seed(1)))
    assert not torch.equal(select(A, 8, how, generator=seed(1)), select(A, 8, how, generator=seed(2)))
    assert torch.equal(select(A, 8, how), select(A, 8, how))


def test_float32_selects_like_float64():
    A = decaying(60, 80, 0.5)
    for how in ("deim", "qdeim", "qr", "norm", "maxvol"):
        assert torch.equal(select(A, 10, how), select(A.float(), 10, how))


@pytest.mark.parametrize("how", SELECTORS)
def test_half_precision_is_accepted(how):
    A = randn(20, 30).bfloat16()
    assert torch.equal(select(A, 5, how), select(A.float(), 5, how))


def test_bad_requests():
    A = randn(10, 20)
    with pytest.raises(CorankError, match="nearest: .*qdeim"):
        select(A, 3, "qdiem")
    with pytest.raises(CorankError, match="between 0 and 10"):
        select(A, 11)
    with pytest.raises(CorankError, match="between 0 and 20"):
        select(A, 21, "norm")
    with pytest.raises(CorankError, match="between 0 and 4"):
        select(A, 5, basis=randn(20, 4))
    with pytest.raises(CorankError, match="20 rows"):
        select(A, 3, basis=randn(10, 4))
    with pytest.raises(CorankError, match="axis"):
        select(A, 3, axis=2)


def test_range_finder_and_sketch():
    A = decaying(60, 80, 2.0)
    exact = float(truncate(A).loss()[10]) ** 0.5
    for power, factor in ((0, 3.0), (2, 1.05)):
        Q = range_finder(A, 14, power)
        assert torch.allclose(Q.T @ Q, torch.eye(14, dtype=torch.float64), atol=1e-12)
        assert loss(A, Q @ (Q.T @ A)) ** 0.5 <= factor * exact
    low = randn(60, 4) @ randn(4, 80, seed=1)
    Q = range_finder(low, 8, 2)
    assert torch.allclose(Q.T @ Q, torch.eye(8, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(Q @ (Q.T @ low), low, atol=1e-10)
    Y = sketch(low, 8)
    assert Y.shape == (8, 80) and torch.linalg.matrix_rank(Y) == 4
    g = torch.Generator().manual_seed
    assert torch.equal(sketch(A, 5, g(3)), sketch(A, 5, g(3))) and not torch.equal(
        sketch(A, 5, g(3)), sketch(A, 5, g(4))
    )
    for call in (lambda: range_finder(A, 61), lambda: range_finder(A, 3, -1), lambda: sketch(A, 0)):
        with pytest.raises(CorankError):
            call()


@pytest.mark.parametrize("how", SELECTORS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_nothing_given_is_modified(how, contiguous):
    A, V = decaying(40, 60), truncate(decaying(40, 60).T, rank=12).up
    A, V = (A, V) if contiguous else (A.T.contiguous().T, V.T.contiguous().T)
    before = A.clone(), V.clone()
    for axis in (0, 1):
        select(A, 12, how, axis=axis, basis=V if axis else None)
    assert torch.equal(A, before[0]) and torch.equal(V, before[1])
