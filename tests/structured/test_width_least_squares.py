"""Column-subset least squares, Nystrom and the Optimal Brain Surgeon are one thing."""

from __future__ import annotations

import pytest
import torch

from corank.errors import CorankError
from corank.linalg.least_squares import (
    affine_column_least_squares,
    column_least_squares,
    complement,
    damped_inverse,
    encoded_least_squares,
    greedy_removal,
    removal_losses,
    removal_order,
    ridge_leverage,
    selection_loss,
)

M, N, T = 7, 24, 400


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(tokens: int = T, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W [M, N] and correlated inputs with a mean, Z [N, tokens]."""
    mix = randn(N, N, seed=seed + 1)
    return randn(M, N, seed=seed), mix @ randn(N, tokens, seed=seed + 2) + randn(N, 1, seed=seed + 3)


def moment(Z: torch.Tensor) -> torch.Tensor:
    return Z @ Z.T / Z.shape[1]


def test_least_squares_nystrom_and_brain_surgeon_agree():
    W, Z = sample()
    C = moment(Z)
    kept = torch.tensor([0, 3, 4, 9, 11, 15, 16, 20, 22])
    gone = complement(kept, N)
    V = column_least_squares(W, C, kept)
    plain = torch.linalg.lstsq(Z[kept].T, (W @ Z).T).solution.T
    nystrom = W @ C[:, kept] @ torch.linalg.pinv(C[kept][:, kept], hermitian=True)
    surgeon, K = W.clone(), torch.linalg.inv(C)
    for r in gone.tolist():  # one column after another, in any order
        c = K[r] / K[r, r]
        surgeon -= torch.outer(surgeon[:, r].clone(), c)
        K = K - torch.outer(K[:, r], c)
    scale = float(V.abs().max())
    for other in (plain, nystrom, surgeon[:, kept]):
        assert torch.allclose(V, other, rtol=0, atol=1e-12 * scale * float(torch.linalg.cond(C)) ** 0.5)
    assert surgeon[:, gone].abs().max() < 1e-9
    residual = W @ Z - V @ Z[kept]
    assert selection_loss(W, C, kept, V) == pytest.approx(float(residual.square().sum() / T), rel=1e-10)


def test_well_conditioned_moments_agree_to_twelve_digits():
    W = randn(M, N)
    Q = torch.linalg.qr(randn(N, N, seed=5)).Q
    C = Q @ torch.diag(torch.linspace(1, 3, N, dtype=torch.float64)) @ Q.T
    kept = torch.arange(0, N, 2)
    K = torch.linalg.inv(C)
    gone = complement(kept, N)
    surgeon = W - W[:, gone] @ torch.linalg.solve(K[gone][:, gone], K[gone])
    nystrom = W @ C[:, kept] @ torch.linalg.inv(C[kept][:, kept])
    V = column_least_squares(W, C, kept)
    assert torch.allclose(V, nystrom, atol=1e-12, rtol=0)
    assert torch.allclose(V, surgeon[:, kept], atol=1e-12, rtol=0)


def test_losses_are_ordered_and_affine_is_the_best():
    W, Z = sample()
    C, mean = moment(Z), Z.mean(1)
    kept = torch.arange(0, N, 3)
    gone = complement(kept, N)
    V, b = affine_column_least_squares(W, C, mean, kept)
    affine = selection_loss(W, C, kept, V, b, mean)
    assert affine == pytest.approx(float((W @ Z - V @ Z[kept] - b[:, None]).square().sum() / T), rel=1e-9)
    assert (W @ Z - V @ Z[kept] - b[:, None]).mean(1).abs().max() < 1e-10
    augmented = torch.cat([Z[kept], torch.ones(1, T, dtype=torch.float64)])
    best = torch.linalg.lstsq(augmented.T, (W @ Z).T).solution.T
    assert torch.allclose(V, best[:, :-1], atol=1e-9) and torch.allclose(b, best[:, -1], atol=1e-9)
    linear = selection_loss(W, C, kept, column_least_squares(W, C, kept))
    flap = selection_loss(W, C, kept, W[:, kept], W[:, gone] @ mean[gone], mean)
    selection = selection_loss(W, C, kept, W[:, kept])
    assert affine < linear < selection and affine < flap < selection


def test_other_inputs_than_those_of_the_target():
    W, Z = sample()
    drifted = Z + 0.3 * randn(N, T, seed=9)
    C, cross = moment(drifted), Z @ drifted.T / T
    kept = torch.arange(1, N, 2)
    V = column_least_squares(W, C, kept, cross=cross)
    assert torch.allclose(V, torch.linalg.lstsq(drifted[kept].T, (W @ Z).T).solution.T, atol=1e-9)
    V, b = affine_column_least_squares(W, C, drifted.mean(1), kept, cross=cross, target_mean=Z.mean(1))
    augmented = torch.cat([drifted[kept], torch.ones(1, T, dtype=torch.float64)])
    best = torch.linalg.lstsq(augmented.T, (W @ Z).T).solution.T
    assert torch.allclose(torch.cat([V, b[:, None]], 1), best, atol=1e-9)


def test_singular_moments_keep_the_weights_where_nothing_was_seen():
    W, Z = sample(tokens=6)
    C = moment(Z)
    kept = torch.arange(0, N, 2)
    V = column_least_squares(W, C, kept)
    assert (W @ Z - V @ Z[kept]).abs().max() < 1e-8  # six tokens can be met exactly by twelve channels
    power = C.diagonal()[kept].sqrt()  # directions count in channels of unit power
    unseen = power[:, None] * torch.linalg.svd(Z[kept] / power[:, None]).U[:, 6:]
    assert torch.allclose(V @ unseen, W[:, kept] @ unseen, atol=1e-8)
    everything = torch.arange(N)
    assert torch.equal(column_least_squares(W, C, everything), W)
    assert torch.equal(column_least_squares(W, torch.zeros(N, N), kept), W[:, kept])
    assert torch.equal(affine_column_least_squares(W, C, Z.mean(1), everything)[0], W)


def test_ridge_pulls_to_the_selection():
    W, Z = sample()
    C, kept = moment(Z), torch.arange(0, N, 2)
    far = column_least_squares(W, C, kept, ridge=1e9)
    assert torch.allclose(far, W[:, kept], atol=1e-6)
    small = column_least_squares(W, C, kept, ridge=1e-12)
    assert torch.allclose(small, column_least_squares(W, C, kept), atol=1e-7)


def test_duplicates_dead_and_constant_channels_cost_nothing():
    W, Z = sample()
    Z[5], Z[8], Z[13] = 0.0, Z[2], 4.0
    C, mean = moment(Z), Z.mean(1)
    kept = complement(torch.tensor([5, 8]), N)
    V = column_least_squares(W, C, kept)
    assert (W @ Z - V @ Z[kept]).abs().max() < 1e-9
    kept = complement(torch.tensor([5, 8, 13]), N)
    V, b = affine_column_least_squares(W, C, mean, kept)
    assert (W @ Z - V @ Z[kept] - b[:, None]).abs().max() < 1e-9
    first = set(removal_order(W, C, 2).tolist())
    assert 5 in first and first & {2, 8}


def test_encoded_least_squares_contains_selection():
    W, Z = sample()
    C, kept = moment(Z), torch.arange(0, N, 3)
    E = torch.eye(N, dtype=torch.float64)[kept]
    assert torch.allclose(encoded_least_squares(W, C, E, W[:, kept]), column_least_squares(W, C, kept), atol=1e-9)
    E = randn(5, N, seed=4)
    V = encoded_least_squares(W, C, E, torch.zeros(M, 5))
    assert torch.allclose(V, torch.linalg.lstsq((E @ Z).T, (W @ Z).T).solution.T, atol=1e-9)


def test_leverage_is_what_its_definition_says():
    _, Z = sample()
    C = moment(Z)
    for ridge in (1e-6, 1e-2, 1.0):
        rho = ridge * float(C.diagonal().mean())
        expected = (C @ torch.linalg.inv(C + rho * torch.eye(N, dtype=torch.float64))).diagonal()
        assert torch.allclose(ridge_leverage(C, ridge), expected, atol=1e-9)
    few = moment(Z[:, :5])
    assert float(ridge_leverage(few, 1e-9).sum()) == pytest.approx(5, rel=1e-5)
    assert torch.equal(ridge_leverage(torch.zeros(3, 3)), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 3])
def test_removal_losses_are_the_increase_of_the_joint_loss(size):
    W, Z = sample()
    C = moment(Z)
    losses = removal_losses(W, C, size, ridge=1e-12)
    for u in range(N // size):
        kept = complement(torch.arange(u * size, (u + 1) * size), N)
        expected = selection_loss(W, C, kept, column_least_squares(W, C, kept))
        assert float(losses[u]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_greedy_removal_is_the_loop_of_its_definition(size, monkeypatch):
    monkeypatch.setattr("corank.linalg.least_squares.PANEL", 4)
    W, Z = sample(seed=3)
    C, units = moment(Z), N // size
    alive = list(range(units))
    expected = []
    while len(alive) > 2:
        best = {}
        for u in alive:
            rest = [v for v in alive if v != u]
            kept = torch.tensor([v * size + i for v in rest for i in range(size)])
            best[u] = selection_loss(W, C, kept, column_least_squares(W, C, kept))
        # the increase over the present loss is what greedy removal looks at; the present loss is common to all
        gone = min(best, key=best.__getitem__)
        alive.remove(gone)
        expected.append(gone)
    assert removal_order(W, C, units - 2, size, ridge=1e-12).tolist() == expected
    kept = greedy_removal(W, C, 4, size, ridge=1e-12)
    assert kept.tolist() == sorted(set(range(units)) - set(expected[: units - 4]))


def test_permuting_channels_permutes_the_selection():
    W, Z = sample(seed=6)
    C = moment(Z)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    kept = greedy_removal(W, C, 10)
    permuted = greedy_removal(W[:, order], C[order][:, order], 10)
    assert sorted(order[permuted].tolist()) == kept.tolist()


def test_indefinite_rounding_and_bad_input():
    _, Z = sample(tokens=4)
    C = moment(Z)
    C = C - 1e-13 * torch.eye(N, dtype=torch.float64) * float(C.diagonal().mean())
    K = damped_inverse(C, 1e-14)
    assert torch.isfinite(K).all() and (K.diagonal() > 0).all()
    with pytest.raises(CorankError, match="ridge must be > 0"):
        damped_inverse(C, 0.0)
    with pytest.raises(CorankError, match="ridge must be >= 0"):
        column_least_squares(randn(2, N), C, torch.arange(3), ridge=-1.0)
    with pytest.raises(CorankError, match="units can stay"):
        greedy_removal(randn(2, N), C, N + 1)
    with pytest.raises(CorankError, match="NaN"):
        column_least_squares(torch.full((2, N), torch.nan), C, torch.arange(3))
