"""Methods that are said to be the same in a special case are the same."""

from __future__ import annotations

import pytest
import torch

from corank import recipe
from corank.factorize import Measured
from corank.statistics import Fisher, Gram, Moments, OutputMetric

SHAPE = (11, 8)


def weight(seed=0):
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(G, mean=None):
    n = G.shape[0]
    mean = torch.zeros(n, dtype=torch.float64) if mean is None else mean
    rms = G.diagonal().sqrt()
    return {
        "gram": Gram(G, mean, 100),
        "moments": Moments(rms, rms, rms, 100),
        "fisher": Fisher(G.diagonal().clone(), torch.ones(SHAPE[0], dtype=torch.float64), 100),
    }


def dense(name, results, rank, **settings):
    made = recipe.get(name).recipe(**settings)
    geometry = made.geometry(Measured(results, {}, made.affine))
    return made.factorize.factorize(weight(), geometry, rank, torch.Generator().manual_seed(0)).factors.dense()


def random_gram(seed=1):
    X = torch.randn(40, SHAPE[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = X @ torch.randn(SHAPE[1], SHAPE[1], generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return X.T @ X / len(X)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_white_inputs_make_every_svd_method_plain(rank):
    results = data(torch.eye(SHAPE[1], dtype=torch.float64))
    expected = dense("svd", results, rank)
    for name in ("asvd", "fwsvd", "svd-llm", "lord"):
        torch.testing.assert_close(dense(name, results, rank), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_uncorrelated_inputs_make_svd_llm_the_diagonal_methods(rank):
    results = data(torch.diag(torch.linspace(0.1, 5, SHAPE[1], dtype=torch.float64)))
    expected = dense("svd-llm", results, rank)
    torch.testing.assert_close(dense("asvd", results, rank, alpha=1.0), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dense("fwsvd", results, rank), expected, rtol=1e-9, atol=1e-10)


def test_asvd_without_exponent_is_plain_svd():
    results = data(random_gram())
    torch.testing.assert_close(dense("asvd", results, 3, alpha=0.0), dense("svd", results, 3), rtol=1e-9, atol=1e-10)


def test_lord_is_svd_llm_on_inputs_without_mean_and_never_worse_otherwise():
    G = random_gram()
    torch.testing.assert_close(dense("lord", data(G), 3), dense("svd-llm", data(G), 3), rtol=1e-8, atol=1e-9)
    mean = torch.linspace(-1, 1, SHAPE[1], dtype=torch.float64)
    shifted = data(G + torch.outer(mean, mean), mean)
    E = weight() - dense("lord", shifted, 3)
    centred = torch.einsum("mi,ij,mj->", E, G, E)  # what is left once the bias has taken the mean
    E = weight() - dense("svd-llm", shifted, 3)
    plain = torch.einsum("mi,ij,mj->", E, G + torch.outer(mean, mean), E)
    assert centred < plain


def test_lord_is_idempotent():
    """Compressing the compressed layer at the same rank changes nothing."""
    results = data(random_gram())
    made = recipe.get("lord").recipe()
    geometry = made.geometry(Measured(results, {}, True))
    once = dense("lord", results, 3)
    twice = made.factorize.factorize(once, geometry, 3, torch.Generator()).factors.dense()
    torch.testing.assert_close(twice, once, rtol=1e-8, atol=1e-9)


def test_interpolation_orders_as_theory_says():
    """At one rank: truncation is best; one-sided interpolation is worse; two-sided CUR is worst."""
    results = data(random_gram())
    G = results["gram"].G

    def loss(name, **settings):
        E = weight() - dense(name, results, 4, **settings)
        return float(torch.einsum("mi,ij,mj->", E, G, E))

    best = loss("svd-llm")
    assert best <= loss("row-id") * (1 + 1e-12) and best <= loss("col-id") * (1 + 1e-12)


def test_cur_fast_depends_on_the_seed_alone():
    results = data(random_gram())
    a, b = dense("cur-fast", results, 4), dense("cur-fast", results, 4)
    assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["column", "row", "cur"])
def test_cur_fast_is_exact_at_the_rank_of_the_weight(form):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(11, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 8, generator=g, dtype=torch.float64)
    made = recipe.get("cur-fast").recipe(form=form)
    geometry = made.geometry(Measured(data(random_gram()), {}))
    found = made.factorize.factorize(W, geometry, 3, torch.Generator().manual_seed(1)).factors.dense()
    torch.testing.assert_close(found, W, rtol=1e-8, atol=1e-9)


def random_output_metric(seed=5):
    g = torch.randn(60, SHAPE[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g = g @ torch.randn(SHAPE[0], SHAPE[0], generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return OutputMetric(g.T @ g / len(g), 60)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("name", ["kfac-svd", "best"])
def test_without_output_metric_the_two_sided_methods_are_svd_llm(name, rank):
    """R = c I: by full shrinkage, or because the gradients are white."""
    results = data(random_gram())
    expected = dense("svd-llm", results, rank)
    metric = {"gradient": random_output_metric(), "clipped-gradient": random_output_metric()}
    found = dense(name, {**results, **metric}, rank, shrink_inputs=0.0, shrink_outputs=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    white = OutputMetric(3.0 * torch.eye(SHAPE[0], dtype=torch.float64), 60)
    found = dense(name, {**results, "gradient": white, "clipped-gradient": white}, rank, shrink_inputs=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["kfac-svd", "best"])
def test_the_two_sided_methods_have_the_least_predicted_change_of_the_loss(name):
    """No rank-3 matrix does better under || R^{1/2} (W - W') G^{1/2} ||, the shrinkage included; svd-llm does worse."""
    metric = random_output_metric()
    results = {**data(random_gram()), "gradient": metric, "clipped-gradient": metric}
    made = recipe.get(name).recipe()
    geometry = made.geometry(Measured(results, {}))
    best = geometry.loss(weight() - dense(name, results, 3))
    root = lambda M: torch.linalg.cholesky(M)  # noqa: E731
    energy = torch.linalg.svdvals(root(geometry.R).T @ weight() @ root(geometry.right.G)).square()
    assert best == pytest.approx(float(energy[3:].sum()), rel=1e-8)
    assert geometry.loss(weight() - dense("svd-llm", results, 3)) > 1.001 * best
