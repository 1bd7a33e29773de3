"""Clusters of alike units: exact on planted clusters, the identity if there are as many clusters as units."""

from __future__ import annotations

import pytest
import torch

from corank.structured.folding import balanced, clusters, features_of, merge_columns, merge_rows


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def membership(labels, count):
    return torch.nn.functional.one_hot(labels, count).T.double()


@pytest.mark.parametrize("count", [1, 4, 11, 30])
def test_merging_is_what_the_membership_matrix_says(count):
    P, W = randn(30, 8, seed=1), randn(5, 30, seed=2)
    labels = clusters(features_of([P], W), count)
    M = membership(labels, count)
    sizes = M @ M.T
    assert torch.equal(sizes, torch.diag(sizes.diagonal())) and float(sizes.trace()) == 30
    inverse = torch.diag(1 / sizes.diagonal())
    assert torch.allclose(merge_rows(P, labels, count), inverse @ M @ P)
    assert torch.allclose(merge_columns(W, labels, count), W @ M.T)
    projection = M.T @ inverse @ M
    assert torch.allclose(projection @ projection, projection)
    inertia = sum((P[labels == c] - P[labels == c].mean(0)).square().sum() for c in range(count))
    assert torch.allclose((P - projection @ P).square().sum(), inertia)
    if count == 30:
        assert labels.tolist() == list(range(30)) and torch.equal(merge_rows(P, labels, 30), P)


def test_planted_clusters_are_found_and_cost_nothing():
    g = torch.Generator().manual_seed(3)
    planted = torch.cat([torch.arange(6), torch.randint(6, (14,), generator=g)])
    P, W = randn(6, 8, seed=4)[planted], randn(5, 20, seed=5) * 1e-3
    labels = clusters(features_of([P], W), 6)
    assert torch.equal(labels, planted)
    x = randn(8, 50, seed=6)
    z, folded = torch.relu(P @ x), torch.relu(merge_rows(P, labels, 6) @ x)
    assert torch.allclose(W @ z, merge_columns(W, labels, 6) @ folded, atol=1e-14)


def test_equal_units_still_make_as_many_clusters_as_were_asked_for():
    labels = clusters(torch.ones(9, 3, dtype=torch.float64), 4)
    assert labels.unique().tolist() == [0, 1, 2, 3]


def test_balancing_changes_nothing_and_makes_scaled_copies_equal():
    up, W = randn(7, 4, seed=7), randn(3, 7, seed=8)
    up[5], W[:, 5] = 3.0 * up[2], W[:, 2] / 3.0
    up[6] = 0.0
    c = balanced(up, W)
    assert torch.allclose(W / c @ (up * c[:, None]), W @ up) and float(c[6]) == 1.0
    assert torch.allclose(up[5] * c[5], up[2] * c[2])
    live = slice(0, 6)
    assert torch.allclose((up * c[:, None]).norm(dim=1)[live], (W / c).norm(dim=0)[live])
