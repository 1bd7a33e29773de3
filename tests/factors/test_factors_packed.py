"""Packing is lossless for every kind and every shape, and survives rounding."""

from __future__ import annotations

import pytest
import torch
from factor_samples import SIZES, make

from corank.factors import KINDS, packed

pytest.importorskip("corank.linalg.packing")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m,n,k", SIZES)
def test_packed_is_the_same_matrix_with_bounded_coefficients(kind, m, n, k):
    factors, W = make(kind, m, n, k)
    result = packed(factors)
    assert result.kind == "row_pivoted" and result.shape == (m, n) and result.dtype == torch.float64
    torch.testing.assert_close(result.dense(), W, rtol=1e-10, atol=1e-10)
    assert result.rank == factors.rank
    if result.rest.numel() and kind != "row_pivoted":
        assert result.rest.abs().max() <= 2 + 1e-9


def test_sixteen_bit_factors_are_packed_in_fp32():
    factors, _ = make("low_rank", 40, 24, 9, torch.float32)
    half = factors.astype(torch.bfloat16)
    W = half.astype(torch.float64).dense()
    result = packed(half)
    assert result.dtype == torch.bfloat16
    assert torch.linalg.norm(result.astype(torch.float64).dense() - W) <= 0.02 * torch.linalg.norm(W)
