"""The nuclear norm, its subgradient, and what minimising it does to a rank."""

from __future__ import annotations

import pytest
import torch

from corank.training.nuclear import nuclear_norm, polar, shrunk


def matrix(m, n, rank=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(m, n, generator=g, dtype=torch.float64)
    return matrix(m, rank, seed=seed) @ matrix(rank, n, seed=seed + 1)


def test_the_subgradient_is_the_gradient_where_there_is_one():
    W = matrix(6, 9).requires_grad_()
    assert torch.autograd.gradcheck(nuclear_norm, (W,))
    value = nuclear_norm(W).detach()
    assert float(value) == pytest.approx(float(torch.linalg.svdvals(W.detach()).sum()), abs=1e-12)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_it_is_a_subgradient_at_matrices_of_low_rank_too(shape):
    """||X||_* >= ||W||_* + <D, X - W> for every X."""
    W = matrix(*shape, rank=2)
    value, D = polar(W)
    assert int(torch.linalg.matrix_rank(D)) == 2
    assert float(torch.linalg.matrix_norm(D, 2)) == pytest.approx(1.0, abs=1e-9)
    for seed in range(20):
        X = W + matrix(*shape, seed=seed + 5) * 10.0 ** -(seed % 5)
        bound = value + (D * (X - W)).sum()
        assert float(torch.linalg.svdvals(X).sum()) >= float(bound) - 1e-9


def test_nothing_and_one_number_are_matrices():
    value, D = polar(torch.zeros(3, 4, dtype=torch.float64))
    assert float(value) == 0 and torch.equal(D, torch.zeros(3, 4, dtype=torch.float64))


def test_a_mask_hides_entries_from_the_penalty():
    W = matrix(6, 9).requires_grad_()
    mask = (matrix(6, 9, seed=3) > 0).double()
    nuclear_norm(W * mask).backward()
    assert W.grad is not None
    _, D = polar((W * mask).detach())
    torch.testing.assert_close(W.grad, D * mask)


def test_descending_it_lowers_the_rank_of_what_is_masked():
    """On toy data: gradient steps on ||M * W - T||^2 + eta ||M * W||_*; the rank at 1e-3 of the largest never rises."""
    mask = (matrix(12, 16, seed=4) > -0.8).double()
    target = mask * (matrix(12, 16, rank=2, seed=6) + 0.05 * matrix(12, 16, seed=8))

    def rank_after(eta, steps=400):
        W = target.clone().requires_grad_()
        for t in range(steps):
            loss = 0.5 * (mask * W - target).square().sum() + eta * nuclear_norm(mask * W)
            (gradient,) = torch.autograd.grad(loss, W)
            W = (W - 0.5 / (1 + t) ** 0.6 * gradient).detach().requires_grad_()
        s = torch.linalg.svdvals((mask * W).detach())
        return float((s / s[0]).sum())  # a smooth count of the rank

    counts = [rank_after(eta) for eta in (0.0, 0.5, 1.0, 2.0)]
    assert all(a > b for a, b in zip(counts, counts[1:], strict=False))


def test_shrinking_solves_the_penalised_problem():
    W = matrix(7, 5)
    X = shrunk(W, 0.8)
    wanted = (torch.linalg.svdvals(W) - 0.8).clamp_min(0)
    torch.testing.assert_close(torch.linalg.svdvals(X), wanted)

    def objective(Z):
        return 0.5 * float((Z - W).square().sum()) + 0.8 * float(torch.linalg.svdvals(Z).sum())

    for seed in range(10):
        assert objective(X) <= objective(X + 1e-2 * matrix(7, 5, seed=seed + 1))
    assert torch.equal(shrunk(W, 1e9), torch.zeros_like(W))
