"""LoRAPrune's stand-in for the gradient of a weight, from those of its adapters."""

from __future__ import annotations

import torch

from corank.structured.lora_gradient import product_gradient, unit_importance, weight_importance
from corank.structured.units import CHANNELS, HEADS, Rows, Units

G = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def adapted(B=None, scale=2.0):
    """(A, B, W, dloss/dW', gA, gB) of loss = <C, tanh(X W'^T)> with W' = W + scale B A."""
    A = random(3, 7).requires_grad_()
    B = (torch.zeros(5, 3, dtype=torch.float64) if B is None else B).requires_grad_()
    W, X, C = random(5, 7), random(11, 7), random(11, 5)
    effective = (W + scale * (B @ A)).detach().requires_grad_()
    dW = torch.autograd.grad((C * (X @ effective.T).tanh()).sum(), effective)[0]
    gA, gB = torch.autograd.grad((C * (X @ (W + scale * (B @ A)).T).tanh()).sum(), (A, B))
    return A.detach(), B.detach(), W, dW, gA, gB


def test_at_the_start_it_is_the_gradient_seen_through_A():
    A, B, _, dW, gA, gB = adapted()
    assert torch.equal(gA, torch.zeros_like(gA))  # as B = 0
    G = product_gradient(A, B, gA, gB)
    assert torch.equal(G, gB @ A)
    torch.testing.assert_close(G, 2.0 * dW @ A.T @ A)


def test_it_is_what_a_step_of_the_adapters_moves_their_product_by():
    A, B, _, _, gA, gB = adapted(random(5, 3))
    moved = (B - gB) @ (A - gA)
    torch.testing.assert_close(B @ A - product_gradient(A, B, gA, gB), moved)


def test_weights_count_as_they_are_with_their_adapters():
    A, B, W, _, gA, gB = adapted(random(5, 3))
    found = weight_importance(W, A, B, gA, gB, 2.0)
    torch.testing.assert_close(found, ((gB @ A + B @ gA - gB @ gA) * (W + 2 * B @ A)).abs())


def test_units_sum_rows_and_columns_normalised_matrix_by_matrix():
    rows = (Rows("gate", 0, 1), Rows("up", 0, 1))
    units = Units("m.down", CHANNELS, 4, 1, rows, "down", "")
    parts = {"m.gate": random(4, 6).abs(), "m.up": random(4, 6).abs(), "m.down": random(6, 4).abs()}
    sums = [parts["m.gate"].sum(1), parts["m.up"].sum(1), parts["m.down"].sum(0)]
    wanted = sum(s / s.norm() for s in sums)
    torch.testing.assert_close(unit_importance(units, "m.", parts), wanted)
    del parts["m.gate"]
    torch.testing.assert_close(unit_importance(units, "m.", parts), sum(s / s.norm() for s in sums[1:]))


def test_a_head_is_its_query_heads_with_their_keys_and_values():
    """Two key-value heads of 3 dimensions, two query heads each."""
    rows = (Rows("q", 0, 6), Rows("k", 0, 3), Rows("v", 0, 3))
    units = Units("o", HEADS, 2, 6, rows, "o", "", (2, 3))
    parts = {"q": random(12, 5).abs(), "k": random(6, 5).abs(), "v": random(6, 5).abs(), "o": random(5, 12).abs()}
    halves = [
        torch.stack([parts["q"][:6].sum(), parts["q"][6:].sum()]),
        torch.stack([parts["k"][:3].sum(), parts["k"][3:].sum()]),
        torch.stack([parts["v"][:3].sum(), parts["v"][3:].sum()]),
        torch.stack([parts["o"][:, :6].sum(), parts["o"][:, 6:].sum()]),
    ]
    torch.testing.assert_close(unit_importance(units, "", parts), sum(h / h.norm() for h in halves))
