"""Gram, cross-Gram, gradient Gram and per-channel moments against their definitions."""

from __future__ import annotations

import pytest
import torch

from corank.errors import CorankError
from corank.statistics import CrossGram, GradientGram, InputGram, InputMoments

torch.manual_seed(0)
X = torch.randn(4, 6, 5, dtype=torch.float64) + 2.0
Z = X + 0.1 * torch.randn_like(X)
MASK = torch.rand(4, 6) < 0.7
ROWS, DRIFTED = X[MASK], Z[MASK]
T = len(ROWS)


def close(a, b, rtol=1e-13):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def gram(x=X, mask=MASK):
    statistic = InputGram(x.shape[-1])
    statistic.update(x, mask)
    return statistic.result()


def test_gram_is_the_uncentred_second_moment_per_token():
    result = gram()
    close(result.G, sum(torch.outer(x, x) for x in ROWS) / T)
    close(result.mean, ROWS.mean(0))
    assert result.count == T
    assert torch.equal(result.G, result.G.T)


def test_rounding_in_the_product_does_not_make_the_gram_asymmetric():
    state = InputGram(5).state()
    state["sum_xx"] = ROWS.T @ ROWS
    state["sum_xx"][0, 3] += 1e-9
    result = InputGram.from_state({**state, "count": torch.tensor(T)}).result()
    assert torch.equal(result.G, result.G.T)
    close(result.G, gram().G, rtol=1e-9)


def test_gram_does_not_care_for_the_shape_of_the_batch():
    close(gram(X.reshape(-1, 5), None).G, gram(X, None).G)
    close(gram(X.reshape(2, 2, 6, 5), MASK.reshape(2, 2, 6)).G, gram().G)


def test_centred_gram_is_the_covariance():
    centred = gram().centred()
    close(centred.G, torch.cov(ROWS.T, correction=0), rtol=1e-12)
    assert torch.equal(centred.mean, torch.zeros(5, dtype=torch.float64))
    close(centred.centred().G, centred.G)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("dtype", "noise"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_few_tokens_and_constant_channels(tokens, dtype, noise):
    x = torch.randn(tokens, 5, dtype=dtype)
    x[:, 0] = 0.1
    x[:, 1] = 0.0
    result = gram(x, None)
    assert torch.linalg.matrix_rank(result.G, hermitian=True, rtol=noise) == tokens
    variance = result.centred().diagonal()
    assert (variance >= 0).all()
    assert variance[0] <= noise and variance[1] == 0


def test_diagonal_is_the_mean_square_and_a_copy():
    result = gram()
    diagonal = result.diagonal()
    close(diagonal, ROWS.square().mean(0))
    diagonal.zero_()
    assert result.G.diagonal().min() > 0


def test_shrinkage():
    result = gram()
    identity = torch.eye(5, dtype=torch.float64)
    assert torch.equal(result.shrink(0.0).G, result.G)
    close(result.shrink(1.0).G, result.G.diagonal().mean() * identity)
    close(result.shrink(0.1).G, 0.9 * result.G + 0.1 * result.G.trace() / 5 * identity)
    close(result.shrink(0.3).G.trace(), result.G.trace())
    close(result.mean, ROWS.mean(0))  # the original is as it was
    for alpha in (-0.1, 1.1):
        with pytest.raises(CorankError, match="outside"):
            result.shrink(alpha)


def test_cross_gram_is_the_joint_moment_of_both_streams():
    statistic = CrossGram(5)
    statistic.update(X, Z, MASK)
    result = statistic.result()
    close(result.C, ROWS.T @ DRIFTED / T)
    close(result.H, gram(Z).G)
    close(result.G, gram(X).G)
    close(result.mean, ROWS.mean(0))
    close(result.drifted_mean, DRIFTED.mean(0))
    assert result.count == T


def test_cross_gram_of_a_stream_with_itself_is_its_gram():
    statistic = CrossGram(5)
    statistic.update(X, X, MASK)
    result = statistic.result()
    close(result.C, result.G)
    close(result.H, result.G)


def test_gradient_gram():
    statistic = GradientGram(5)
    statistic.update(X, MASK)
    result = statistic.result()
    close(result.R, ROWS.T @ ROWS / T)
    assert torch.equal(result.R, result.R.T)
    close(result.diagonal(), result.R.diagonal())
    close(result.shrink(0.3).R, 0.7 * result.R + 0.3 * result.R.trace() / 5 * torch.eye(5, dtype=torch.float64))


def test_moments_and_the_diagonal_of_the_gram():
    statistic = InputMoments(5)
    statistic.update(X, MASK)
    result = statistic.result()
    close(result.rms, gram().diagonal().sqrt())
    close(result.abs_mean, ROWS.abs().mean(0))
    close(result.mean, ROWS.mean(0))
    assert (result.abs_mean <= result.rms).all()


def test_float32_products_are_accurate_over_many_tokens():
    x = torch.randn(40_000, 8) + 3.0
    exact = x.double().T @ x.double() / len(x)
    result = gram(x, None)
    assert (result.G - exact).abs().max() <= 1e-5 * exact.abs().max()
    statistic = InputGram(8)
    for part in x.split(256):  # a float32 total would have drifted
        statistic.update(part)
    assert (statistic.result().G - exact).abs().max() <= 2e-7 * exact.abs().max()
