"""The robust output metric of KFAC-SVD against its definition, token by token."""

from __future__ import annotations

import pytest
import torch

from corank.errors import CorankError
from corank.statistics import ClippedGradientGram, GradientGram

torch.manual_seed(1)
G = (
    torch.randn(3, 24, 5, dtype=torch.float64)
    * torch.logspace(-3, 3, 24, dtype=torch.float64)[torch.randperm(24)][:, None]
)


def by_hand(sequence):
    """Sum of g g^T over inner tokens, each norm moved into [0.1, 10] times their mean norm."""
    inner = sequence[len(sequence) // 8 : len(sequence) - len(sequence) // 8]
    mean = sum(float(g.norm()) for g in inner) / len(inner)
    total = torch.zeros(5, 5, dtype=torch.float64)
    for g in inner:
        g = g * min(max(float(g.norm()), 0.1 * mean), 10 * mean) / float(g.norm())
        total += torch.outer(g, g)
    return total, len(inner)


def test_it_is_the_clipped_second_moment_of_inner_tokens():
    statistic = ClippedGradientGram(5)
    statistic.update(G)
    sums = [by_hand(s) for s in G]
    torch.testing.assert_close(
        statistic.result().R, sum(s for s, _ in sums) / sum(n for _, n in sums), rtol=1e-12, atol=0
    )
    assert statistic.result().count == 3 * 18


def test_padding_is_cut_before_the_ends_are():
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[1, 16:] = False
    statistic, apart = ClippedGradientGram(5), ClippedGradientGram(5)
    statistic.update(G, mask)
    apart.update(G[:1]), apart.update(G[1:2, :16]), apart.update(G[2:])
    torch.testing.assert_close(statistic.result().R, apart.result().R, rtol=1e-12, atol=0)


def test_loud_tokens_cannot_dominate_and_silent_ones_stay_silent():
    g = torch.ones(1, 400, 5, dtype=torch.float64)  # among few tokens the loud one would raise the mean itself
    g[0, 60] *= 1e6
    g[0, 70] = 0
    robust, plain = ClippedGradientGram(5), GradientGram(5)
    robust.update(g), plain.update(g)
    assert float(robust.result().R.trace()) < 1e-1 * float(plain.result().R.trace())
    assert torch.isfinite(robust.result().R).all()


def test_without_loud_tokens_it_is_the_plain_one_on_inner_tokens():
    g = torch.nn.functional.normalize(torch.randn(2, 16, 5, dtype=torch.float64), dim=-1)
    robust, plain = ClippedGradientGram(5), GradientGram(5)
    robust.update(g), plain.update(g[:, 2:14])
    torch.testing.assert_close(robust.result().R, plain.result().R, rtol=1e-12, atol=1e-15)


def test_rows_without_sequences_are_refused():
    with pytest.raises(CorankError, match="batch, tokens, 5"):
        ClippedGradientGram(5).update(G[0])
