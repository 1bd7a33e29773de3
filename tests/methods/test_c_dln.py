"""A deep linear network in its own subspace learns what the wide one learns."""

from __future__ import annotations

import itertools

import pytest
import torch

from corank.errors import CorankError
from corank.linalg.deep import descend, product, start
from corank.methods.matrices.c_dln import CompressedDeepLinear


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(m, n, r, seed=0):
    U, V = torch.linalg.qr(randn(m, r, seed=seed)).Q, torch.linalg.qr(randn(n, r, seed=seed + 1)).Q
    return U * torch.linspace(2, 1, r, dtype=torch.float64) @ V.T


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_step_is_automatic_differentiation_of_the_loss(depth):
    factors = [randn(4, 7), *(randn(4, 4, seed=s) for s in range(depth - 2)), randn(6, 4, seed=9)]
    Y = randn(6, 7, seed=5)
    rates = [0.1 * (i + 1) for i in range(depth)]
    leaves = [f.clone().requires_grad_() for f in factors]
    (0.5 * (product(leaves) - Y).square().sum()).backward()
    found = descend(factors, lambda M: M - Y, rates)
    for new, leaf, rate in zip(found, leaves, rates, strict=True):
        torch.testing.assert_close(new, (leaf - rate * leaf.grad).detach(), rtol=1e-10, atol=1e-12)


def test_the_trajectory_is_that_of_the_wide_network():
    """With the true singular vectors both follow each other to the power depth of the start, all the way."""
    m, r, depth, eps = 12, 2, 3, 5e-2
    Y = low_rank(m, m, r)
    wide, narrow = start(Y, m, depth, eps), start(Y, 2 * r, depth, eps)
    distances = []
    for step in range(1500):
        wide, narrow = (descend(f, lambda M: M - Y, [0.1] * depth) for f in (wide, narrow))
        if step % 100 == 99:
            assert torch.linalg.matrix_norm(product(wide) - product(narrow)) <= (m - 2 * r) ** 0.5 * eps**depth
            distances.append(float(torch.linalg.matrix_norm(product(narrow) - Y)))
    assert distances[-1] <= r**0.5 * eps**depth  # the directions of the subspace that the target does not have
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(distances))


@pytest.mark.parametrize("depth", [2, 3])
def test_a_matrix_is_completed_from_a_part_of_its_entries(depth):
    Y = low_rank(40, 30, 2)
    mask = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    shown = torch.where(mask, Y, torch.tensor(float("nan"), dtype=torch.float64))  # what is hidden is never read
    model = CompressedDeepLinear(2, depth).fit(shown, mask)
    assert model.numel == 4 * (40 + 30) + (depth - 2) * 16
    error = torch.linalg.matrix_norm(model.matrix() - Y) / torch.linalg.matrix_norm(Y)
    surrogate = torch.where(mask, Y, 0.0) / mask.double().mean()
    U, s, Vh = torch.linalg.svd(surrogate)
    spectral = torch.linalg.matrix_norm(U[:, :2] * s[:2] @ Vh[:2] - Y) / torch.linalg.matrix_norm(Y)
    assert float(error) < 2e-2 and float(spectral) > 5 * float(error)
    scaled = CompressedDeepLinear(2, depth).fit(1000 * shown, mask)
    torch.testing.assert_close(scaled.matrix(), 1000 * model.matrix(), rtol=1e-5, atol=1e-4)


def test_a_matrix_is_found_from_linear_measurements():
    M = low_rank(12, 10, 1)
    A = randn(120, 12, 10, seed=3)
    model = CompressedDeepLinear(1, rate=0.2).fit_sensing(A, torch.einsum("imn,mn->i", A, M))
    assert float(torch.linalg.matrix_norm(model.matrix() - M) / torch.linalg.matrix_norm(M)) < 1e-3


def test_the_same_data_give_the_same_bits_and_nonsense_is_refused():
    Y = low_rank(9, 8, 1)
    assert torch.equal(CompressedDeepLinear(1).fit(Y).matrix(), CompressedDeepLinear(1).fit(Y).matrix())
    assert torch.equal(CompressedDeepLinear(1).fit(0 * Y).matrix(), 0 * Y)
    with pytest.raises(CorankError, match="fit first"):
        CompressedDeepLinear(1).matrix()
    with pytest.raises(CorankError, match="depth at least 2"):
        CompressedDeepLinear(1, depth=1)
    with pytest.raises(CorankError, match="must be positive"):
        CompressedDeepLinear(1, rate=0.0)
    with pytest.raises(CorankError, match="hold some True"):
        CompressedDeepLinear(1).fit(Y, torch.zeros(9, 8, dtype=torch.bool))
    with pytest.raises(CorankError, match="one value per operator"):
        CompressedDeepLinear(1).fit_sensing(randn(3, 4, 5), randn(2))
    with pytest.raises(CorankError, match="diverged"):
        CompressedDeepLinear(1, rate=100.0).fit(Y)
