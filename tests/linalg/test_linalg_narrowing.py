"""Fewer inputs of a matrix, in both metrics: every number against brute force on the data."""

from __future__ import annotations

import itertools

import pytest
import torch

from corank.errors import CorankError
from corank.linalg import psd_root, truncate
from corank.linalg.narrowing import Leading, columns_of, narrowed, nested_units, spectral_losses


def problem(m=9, n=12, tokens=200, seed=0, heavy=1.0):
    """W [m, n], tokens Z [T, n] and their C, and an output metric R [m, m] that is far from the identity."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    Z = (randn(tokens, n) @ randn(n, n)) * (heavy * randn(n)).exp()
    B = randn(m, m) * torch.arange(1, m + 1, dtype=torch.float64) ** -0.7
    return randn(m, n), Z, Z.T @ Z / tokens, B @ B.T + 0.01 * torch.eye(m, dtype=torch.float64)


def on_the_data(W, Z, R, columns, V=None):
    """mean || R^{1/2} (W z - V z_J) ||^2, with the best V by lstsq if none is given."""
    if V is None:
        V = torch.linalg.lstsq(Z[:, columns], Z @ W.T).solution.T
    error = Z @ W.T - Z[:, columns] @ V.T
    return float(((error @ R) * error).sum() / len(Z))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("how", ["greedy", "leverage"])
def test_the_curve_is_what_the_best_fit_loses_on_the_data(size, how):
    W, Z, C, R = problem()
    found = nested_units(W, C, R, size, how)
    assert sorted(found.order.tolist()) == list(range(12 // size)) and float(found.loss[-1]) == 0
    for k in range(12 // size + 1):
        columns = columns_of(found.kept(k), size)
        assert float(found.loss[k]) == pytest.approx(on_the_data(W, Z, R, columns), rel=1e-9, abs=1e-12)
        assert on_the_data(W, Z, R, columns, narrowed(W, C, columns)) == pytest.approx(
            float(found.loss[k]), rel=1e-9, abs=1e-12
        )


def test_what_is_put_in_the_place_of_the_fit_loses_what_it_is_away_from_it_and_no_more():
    W, Z, C, R = problem(seed=1)
    nested = nested_units(W, C, R)
    columns = nested.kept(7)
    V = narrowed(W, C, columns)
    F = V + torch.randn(9, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    further = float(((R @ (V - F)) * ((V - F) @ C[columns][:, columns])).sum())
    assert on_the_data(W, Z, R, columns, F) == pytest.approx(float(nested.loss[7]) + further, rel=1e-10)


def test_the_first_to_go_is_the_one_that_is_missed_least_of_all_pairs_for_the_second_too():
    for seed in range(5):
        W, Z, C, R = problem(m=5, n=6, seed=seed)
        nested = nested_units(W, C, R)
        alone = [on_the_data(W, Z, R, torch.tensor([j for j in range(6) if j != i])) for i in range(6)]
        assert float(nested.loss[5]) == pytest.approx(min(alone), rel=1e-8)
        gone = int(nested.order[5])
        then = [
            on_the_data(W, Z, R, torch.tensor([j for j in range(6) if j not in (i, gone)]))
            for i in range(6)
            if i != gone
        ]
        assert float(nested.loss[4]) == pytest.approx(min(then), rel=1e-8)
        best = min(on_the_data(W, Z, R, torch.tensor(J)) for J in itertools.combinations(range(6), 3))
        assert best * (1 - 1e-9) <= float(nested.loss[3])


def test_greedy_loses_less_than_leverage_which_looks_at_inputs_alone():
    for seed in range(4):
        W, _, C, R = problem(m=10, n=30, tokens=500, seed=seed, heavy=1.5)
        greedy, leverage = (nested_units(W, C, R, how=how).loss for how in ("greedy", "leverage"))
        ratio = greedy[1:-1] / leverage[1:-1]
        assert float((ratio <= 1 + 1e-9).double().mean()) > 0.9  # a greedy order is not the best at every number
        assert float(ratio.log().mean().exp()) < 0.85


def test_duplicates_and_dead_channels_cost_nothing():
    W, Z, _, R = problem()
    Z[:, 3], Z[:, 8] = 0.0, 2 * Z[:, 1]
    C = Z.T @ Z / len(Z)
    nested = nested_units(W, C, R)
    total = float(nested.loss[0])
    assert float(nested.loss[10]) <= 1e-10 * total < float(nested.loss[9])
    columns = nested.kept(10)
    assert on_the_data(W, Z, R, columns, narrowed(W, C, columns)) <= 1e-10 * total
    assert not Leading.of(W, C, nested.order).exact
    nothing = Leading.of(W, torch.zeros_like(C), torch.arange(12))
    assert float(nothing.losses(R).abs().max()) == 0 and nothing.matrix(5) is None


@pytest.mark.parametrize("size", [1, 3])
def test_one_factor_gives_the_fit_at_every_number_of_units(size):
    W, _, C, R = problem()
    nested = nested_units(W, C, R, size)
    leading = Leading.of(W, C, nested.order, size)
    for k in range(12 // size + 1):
        expected = narrowed(W, C, columns_of(nested.kept(k), size))
        torch.testing.assert_close(leading.matrix(k), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("case", ["both", "inputs", "outputs", "none", "diagonal", "singular"])
def test_losses_without_vectors_are_those_of_the_truncation(shape, case):
    m, n = shape
    W, _, C, R = problem(m, n, seed=3)
    if case == "diagonal":
        C = C.diagonal().clone()
    if case == "singular":
        C = C[:, :4] @ C[:4]
        C = C @ C.T
    G, M = (C if case not in ("outputs", "none") else None), (R if case not in ("inputs", "none") else None)
    expected = truncate(W, G, R=M).loss()
    found = spectral_losses(W, G, M, None if G is None else psd_root(G))
    assert found.shape == expected.shape == (min(m, n) + 1,)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * float(expected[0]))
    torch.testing.assert_close(spectral_losses(W, G, M), found, rtol=1e-12, atol=1e-12 * float(expected[0]))


def test_bad_input_is_one_sentence():
    W, _, C, R = problem()
    with pytest.raises(CorankError, match="order of units"):
        nested_units(W, C, R, how="best")
    with pytest.raises(CorankError, match="units of 5"):
        nested_units(W, C, R, size=5)
