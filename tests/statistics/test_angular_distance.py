"""Angles at the last real token."""

from __future__ import annotations

import math

import pytest
import torch

from corank.errors import CorankError
from corank.statistics import AngularDistance


def distance(h_in, h_out, mask=None):
    statistic = AngularDistance()
    statistic.update(h_in, h_out, mask)
    return statistic.result()


def planted(mask, angles):
    """Hidden states whose last real token turns by the given angles, and every other by a right angle."""
    samples, tokens = mask.shape
    before = torch.zeros(samples, tokens, 3, dtype=torch.float64)
    before[..., 0] = 2.0
    after = torch.zeros_like(before)
    after[..., 1] = 5.0
    for b, theta in enumerate(angles):
        last = max(t for t in range(tokens) if mask[b, t])
        after[b, last] = 7 * torch.tensor([math.cos(theta), math.sin(theta), 0.0], dtype=torch.float64)
    return before, after


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_uses_the_last_real_token_whatever_the_padding(side):
    mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    if side == "left":
        mask = mask.flip(1)
    if side == "holes":
        mask = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    angles = [0.3, 1.2, 3.0]
    before, after = planted(mask, angles)
    assert distance(before, after, mask) == pytest.approx(sum(angles) / 3 / math.pi, rel=1e-12)


def test_without_a_mask_the_last_position_counts():
    mask = torch.ones(2, 4, dtype=torch.bool)
    before, after = planted(mask, [0.5, 0.7])
    assert distance(before, after) == pytest.approx(0.6 / math.pi, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_parallel_opposite_and_orthogonal_at_any_scale(scale):
    h = torch.randn(64, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert distance(h, h * scale) <= 3e-8  # rounding may put the cosine above one: the clamp
    assert distance(h, -h * scale) >= 1 - 3e-8
    x = torch.zeros(1, 1, 2, dtype=torch.float64)
    y = x.clone()
    x[..., 0], y[..., 1] = scale, 1.0
    assert distance(x, y) == 0.5


def test_zero_vectors_are_a_number():
    zero, one = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert distance(zero, zero) == 0.0
    assert distance(zero, one) == 0.5


def test_low_precision_states_are_compared_in_float64():
    h = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    z = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    cosine = torch.nn.functional.cosine_similarity(h[:, -1].double(), z[:, -1].double())
    assert distance(h, z) == pytest.approx(float((cosine.arccos() / math.pi).mean()), rel=1e-12)


def test_needs_samples_of_tokens():
    with pytest.raises(CorankError, match=r"\[B, T, d\]"):
        distance(torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(CorankError, match=r"\[B, T, d\]"):
        distance(torch.zeros(3, 4, 5), torch.zeros(3, 4, 6))
