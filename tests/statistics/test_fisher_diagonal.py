"""The Fisher against automatic differentiation, one sample at a time."""

from __future__ import annotations

import pytest
import torch

from corank.errors import CorankError
from corank.statistics import FisherDiagonal, InputGram

B, T, M, N = 6, 5, 4, 3


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W, v, x = randn(M, N), randn(M), randn(B, T, N)
    lengths = torch.tensor([5, 1, 3, 2, 5, 4])
    right = torch.arange(T) < lengths[:, None]
    return W, v, x, right


def sample_loss(W, v, x, mask):
    """A loss that couples the tokens of a sample, but only the real ones."""
    hidden = torch.tanh(x @ W.T) * mask[:, None]
    return (hidden.sum(0) @ v).square() + (hidden**3).sum()


def squared_gradients(W, v, x, mask):
    total = torch.zeros_like(W)
    for x_b, mask_b in zip(x, mask, strict=True):
        leaf = W.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sample_loss(leaf, v, x_b, mask_b), leaf)
        total += gradient.square()
    return total / len(x)


def output_gradients(W, v, x, mask):
    y = (x @ W.T).detach().requires_grad_()
    hidden = torch.tanh(y) * mask[..., None]
    loss = (hidden.sum(1) @ v).square() + (hidden**3).sum((1, 2))
    loss.sum().backward()
    return y.grad


@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_per_sample_autograd_with_padding(side):
    W, v, x, mask = problem()
    if side == "left":
        mask = mask.flip(1)
    F = squared_gradients(W, v, x, mask)
    g = output_gradients(W, v, x, mask)
    statistic = FisherDiagonal(M, N)
    nowhere = ~mask[..., None]
    statistic.update(x.masked_fill(nowhere, float("nan")), g.masked_fill(nowhere, float("inf")), mask)
    result = statistic.result()
    torch.testing.assert_close(result.columns, F.sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.rows, F.sum(1), rtol=1e-12, atol=0)
    assert result.count == B


def test_rows_and_columns_have_the_same_total():
    W, v, x, mask = problem(1)
    statistic = FisherDiagonal(M, N)
    statistic.update(x, output_gradients(W, v, x, mask), mask)
    result = statistic.result()
    torch.testing.assert_close(result.columns.sum(), result.rows.sum(), rtol=1e-13, atol=0)


def test_is_not_the_square_of_the_mean_gradient():
    x = torch.ones(2, 1, N, dtype=torch.float64)
    g = torch.stack([torch.ones(1, M), -torch.ones(1, M)]).double()  # the batch gradient cancels
    statistic = FisherDiagonal(M, N)
    statistic.update(x, g)
    assert torch.equal(statistic.result().columns, torch.full((N,), float(M), dtype=torch.float64))


def test_tokens_of_one_sample_are_added_before_squaring():
    x = torch.ones(1, 2, N, dtype=torch.float64)
    g = torch.tensor([[[1.0] * M, [-1.0] * M]], dtype=torch.float64)
    statistic = FisherDiagonal(M, N)
    statistic.update(x, g)
    assert torch.equal(statistic.result().columns, torch.zeros(N, dtype=torch.float64))


def test_white_errors_of_a_linear_model_give_the_input_mean_square():
    """Squared loss, e independent of x with E[e_i^2] = s: sum_i F_ij = m s E[x_j^2], exactly."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(9, N, generator=generator, dtype=torch.float64)
    s = 1.7
    # All signs of e with all x: the expectation over the product distribution, not a sample of it.
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * M)
    errors = signs * s**0.5
    x = inputs.repeat_interleave(len(errors), 0)[:, None, :]
    e = errors.repeat(len(inputs), 1)[:, None, :]
    fisher, gram = FisherDiagonal(M, N), InputGram(N)
    fisher.update(x, e)
    gram.update(inputs)
    torch.testing.assert_close(fisher.result().columns, M * s * gram.result().diagonal(), rtol=1e-12, atol=0)


def test_needs_samples():
    with pytest.raises(CorankError, match=r"\[B, T, 3\]"):
        FisherDiagonal(M, N).update(torch.zeros(5, N), torch.zeros(5, M))
