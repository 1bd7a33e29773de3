"""One basis for several matrices: the optimum, its loss, and its special cases, in float64."""

from __future__ import annotations

import pytest
import torch

from corank.errors import CorankError
from corank.factorize import Geometry, Metric, Spectral
from corank.factorize.joint import decompose_jointly

SHAPES = {"attention with fewer heads": (12, 6, 6), "gate and up": (17, 17), "layers": (9, 9, 9), "one row": (1, 8)}
N = 10


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(ms, seed=0):
    return [random(m, N, seed=seed + i) * 3.0**-i for i, m in enumerate(ms)]


def moment(n=N, tokens=40, seed=0):
    X = random(tokens, n, seed=100 + seed) @ random(n, n, seed=200 + seed)
    return X.T @ X / tokens


def geometries(ms, same=True, output=False, tokens=40, output_rank=None):
    first = Metric(moment(tokens=tokens))
    rights = [first if same else Metric(moment(tokens=tokens, seed=i) * 4.0**i) for i in range(len(ms))]
    Rs = [moment(m, output_rank or 3 * m, seed=50 + i) if output else None for i, m in enumerate(ms)]
    return [Geometry(right, R) for right, R in zip(rights, Rs, strict=True)]


def realised(W, geometry, B, A):
    return geometry.loss(W - B @ A)


@pytest.mark.parametrize("output", [False, True], ids=["inputs", "both sides"])
@pytest.mark.parametrize("ms", SHAPES.values(), ids=SHAPES)
def test_the_loss_of_every_matrix_at_every_rank_is_known_and_adds_up_to_the_discarded_eigenvalues(ms, output):
    Ws, gs = weights(ms), geometries(ms, output=output)
    joint = decompose_jointly(Ws, gs)
    assert joint.losses.shape == (len(ms), min(sum(ms), N) + 1)
    torch.testing.assert_close(joint.losses.sum(0), joint.truncation.loss(), rtol=1e-10, atol=1e-10)
    for k in range(min(sum(ms), N) + 1):
        A, Bs = joint.cut(Ws, gs, k)
        assert A.shape == (k, N) and [B.shape for B in Bs] == [(m, k) for m in ms]
        found = [realised(W, g, B, A) for W, g, B in zip(Ws, gs, Bs, strict=True)]
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64),
            joint.losses[:, k],
            rtol=1e-9,
            atol=1e-9 * float(joint.losses.sum()),
        )


@pytest.mark.parametrize("shares", [None, (1.0, 0.2, 5.0)])
@pytest.mark.parametrize("output", [False, True], ids=["inputs", "both sides"])
def test_no_other_common_basis_is_better(output, shares):
    ms, k = (12, 6, 6), 4
    Ws, gs = weights(ms), geometries(ms, output=output)
    w = shares or (1.0,) * 3
    joint = decompose_jointly(Ws, gs, shares)
    A, Bs = joint.cut(Ws, gs, k)
    best = sum(w_ * realised(W, g, B, A) for w_, W, g, B in zip(w, Ws, gs, Bs, strict=True))
    S = gs[0].right.root
    for trial in range(60):
        other = A + random(k, N, seed=trial) * (1e-3 if trial % 2 else 1.0) * A.abs().mean()
        # the best coefficients for that basis, by least squares on the data
        fitted = [torch.linalg.lstsq((other @ S).T, (W @ S).T).solution.T for W in Ws]
        loss = sum(w_ * realised(W, g, B, other) for w_, W, g, B in zip(w, Ws, gs, fitted, strict=True))
        assert loss >= best * (1 - 1e-10)
    for i in range(60):
        moved = [B + 1e-3 * random(*B.shape, seed=i + j) for j, B in enumerate(Bs)]
        loss = sum(w_ * realised(W, g, B, A) for w_, W, g, B in zip(w, Ws, gs, moved, strict=True))
        assert loss >= best * (1 - 1e-10)


def test_it_is_the_form_of_the_paper():
    """Basis Sharing: svd(S^T [W_1^T ... W_g^T]), basis S^-T U_k Sigma_k, coefficients the columns of V_k^T."""
    Ws, gs = weights((9, 9)), geometries((9, 9))
    S = torch.linalg.cholesky(gs[0].right.G)
    U, sigma, Vt = torch.linalg.svd(S.T @ torch.cat([W.T for W in Ws], 1), full_matrices=False)
    basis = torch.linalg.solve(S.T, U[:, :5] * sigma[:5])
    A, Bs = decompose_jointly(Ws, gs).cut(Ws, gs, 5)
    for i, B in enumerate(Bs):
        torch.testing.assert_close(B @ A, (basis @ Vt[:5, 9 * i : 9 * i + 9]).T, rtol=1e-9, atol=1e-9)


def test_a_group_of_one_is_the_matrix_alone():
    W = weights((12,))
    gs = geometries((12,))
    joint, private = decompose_jointly(W, gs), Spectral().decompose(W[0], gs[0])
    assert torch.equal(joint.truncation.up, private.up) and torch.equal(joint.truncation.project, private.project)
    torch.testing.assert_close(joint.losses[0], private.loss(), rtol=1e-12, atol=0)
    both = geometries((12,), output=True)
    joint, private = decompose_jointly(W, both), Spectral().decompose(W[0], both[0])
    A, (B,) = joint.cut(W, both, 4)
    B0, A0 = private.pair(W[0], 4)
    torch.testing.assert_close(B @ A, B0 @ A0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(joint.losses[0], private.loss(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("same", [True, False], ids=["one input", "scaled inputs"])
def test_equal_matrices_share_for_nothing(same):
    W = weights((7,))[0]
    first = Metric(moment())
    gs = [Geometry(first), Geometry(first if same else Metric(moment() * 3.0))]
    joint = decompose_jointly([W, W], gs)
    alone = Spectral().decompose(W, gs[0]).loss()
    torch.testing.assert_close(joint.losses[0, :8], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(joint.losses[1, :8], alone * (1 if same else 3), rtol=1e-9, atol=1e-9)
    A, (B, C) = joint.cut([W, W], gs, 3)
    torch.testing.assert_close(B @ A, C @ A, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shares", [None, (1.0, 0.2, 5.0)])
@pytest.mark.parametrize("output", [False, True], ids=["inputs", "both sides"])
def test_matrices_of_several_layers_are_judged_by_their_own_inputs(output, shares):
    ms = (9, 6, 9)
    Ws, gs = weights(ms), geometries(ms, same=False, output=output)
    joint = decompose_jointly(Ws, gs, shares)
    for k in range(N + 1):
        A, Bs = joint.cut(Ws, gs, k)
        found = torch.tensor([realised(*part, A) for part in zip(Ws, gs, Bs, strict=True)], dtype=torch.float64)
        torch.testing.assert_close(found, joint.losses[:, k], rtol=1e-8, atol=1e-9 * float(joint.losses[:, 0].max()))
        up = joint.truncation.up[:, :k].split(list(ms))
        pooled = torch.tensor([realised(W, g, B, A) for W, g, B in zip(Ws, gs, up, strict=True)], dtype=torch.float64)
        assert (found <= pooled * (1 + 1e-9) + 1e-9).all()  # the fit to its own inputs is never worse
    if not output and shares is None:  # the basis is that of the sum of the moments
        total = sum(g.right.G for g in gs)
        expected = Spectral().decompose(torch.cat(Ws), Geometry(Metric(total)))
        torch.testing.assert_close(joint.truncation.up, expected.up)


def test_a_share_of_the_loss_does_not_depend_on_scale():
    """With shares 1 / total, a matrix that is ten times larger, or whose inputs are, has no larger say."""
    ms = (9, 9)
    Ws, gs = weights(ms), geometries(ms, same=False)

    def relative(Ws, gs):
        totals = [g.loss(W) for W, g in zip(Ws, gs, strict=True)]
        joint = decompose_jointly(Ws, gs, [1 / t for t in totals])
        return joint.losses / torch.tensor(totals, dtype=torch.float64)[:, None]

    expected = relative(Ws, gs)
    assert expected[:, 0].tolist() == pytest.approx([1.0, 1.0], rel=1e-9)
    torch.testing.assert_close(relative([10 * Ws[0], Ws[1]], gs), expected, rtol=1e-8, atol=1e-9)
    louder = [Geometry(Metric(gs[0].right.G * 100)), gs[1]]
    torch.testing.assert_close(relative(Ws, louder), expected, rtol=1e-8, atol=1e-9)


CASES = {
    "few tokens": dict(tokens=3),
    "few tokens in each layer": dict(tokens=3, same=False),
    "singular output metric": dict(output=True, output_rank=2),
    "singular output metrics of layers": dict(output=True, output_rank=2, same=False),
}


@pytest.mark.parametrize("case", CASES)
def test_singular_statistics_are_a_normal_case(case):
    ms = (7, 5)
    Ws, gs = weights(ms), geometries(ms, **CASES[case])
    joint = decompose_jointly(Ws, gs)
    assert torch.isfinite(joint.losses).all()
    for k in (1, 3, N):
        A, Bs = joint.cut(Ws, gs, k)
        for i, (W, g, B) in enumerate(zip(Ws, gs, Bs, strict=True)):
            assert torch.isfinite(B).all()
            assert realised(W, g, B, A) == pytest.approx(
                float(joint.losses[i, k]), rel=1e-7, abs=1e-9 * float(joint.losses[i, 0])
            )


def test_a_silent_channel_a_zero_matrix_and_no_statistics():
    Ws = [weights((6,))[0], torch.zeros(4, N, dtype=torch.float64)]
    G = moment()
    G[:, 2] = G[2] = 0
    for right in (Metric(G), Metric(), Metric(G.diagonal().clone())):
        gs = [Geometry(right)] * 2
        joint = decompose_jointly(Ws, gs)
        A, Bs = joint.cut(Ws, gs, 3)
        assert realised(Ws[0], gs[0], Bs[0], A) == pytest.approx(float(joint.losses[0, 3]), rel=1e-9)
        assert float(joint.losses[1].abs().max()) == 0 and torch.isfinite(Bs[1]).all()


def test_rows_of_the_basis_that_one_layer_cannot_tell_apart():
    """Two rows of the basis look alike to the inputs of the second layer: the later one adds nothing there."""
    e = torch.eye(N, dtype=torch.float64)
    W = torch.diag(torch.arange(N, 0, -1, dtype=torch.float64))[:6]
    alike = torch.diag(torch.cat([torch.ones(2), torch.full((N - 2,), 0.5)])).double()
    alike[0, 1] = alike[1, 0] = 1.0  # x_0 = x_1 always
    gs = [Geometry(Metric(e.clone())), Geometry(Metric(alike))]
    Ws = [W, W.flip(0)]
    joint = decompose_jointly(Ws, gs)
    for k in range(N + 1):
        A, Bs = joint.cut(Ws, gs, k)
        for i, B in enumerate(Bs):
            assert realised(Ws[i], gs[i], B, A) == pytest.approx(float(joint.losses[i, k]), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("output", [False, True])
def test_float32_weights_lose_what_float64_weights_lose(output):
    ms = (24, 12, 12)
    Ws = [random(m, 20, seed=i) for i, m in enumerate(ms)]
    G = Metric(moment(20, 80))
    gs = [Geometry(G, moment(m, 90, seed=i) if output else None) for i, m in enumerate(ms)]
    single = decompose_jointly([W.float() for W in Ws], gs)
    double = decompose_jointly([W.float().double() for W in Ws], gs)
    assert single.truncation.up.dtype == torch.float32
    torch.testing.assert_close(
        single.losses.sum(0), double.losses.sum(0), rtol=1e-3, atol=1e-4 * float(double.losses.sum())
    )


def test_different_inputs_cannot_share():
    with pytest.raises(CorankError, match="same size"):
        decompose_jointly([random(3, 4), random(3, 5)], [Geometry(), Geometry()])
