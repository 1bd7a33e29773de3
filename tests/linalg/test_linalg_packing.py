from __future__ import annotations

import pytest
import torch
from linalg_oracles import inputs, randn

from corank.errors import CorankError
from corank.linalg import pack, truncate, unpack
from corank.linalg.selection import lu_pivots


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (12, 12), (1, 5)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_packing_is_lossless_counts_right_and_stays_small(shape, share):
    m, n = shape
    k = round(share * min(m, n))
    B, A = randn(m, k), randn(k, n, seed=1)
    packed = pack(B, A)
    assert torch.allclose(unpack(packed), B @ A, atol=1e-10)
    assert packed.rows.shape == (k, n) and packed.rest.shape == (m - k, k)
    assert packed.rows.numel() + packed.rest.numel() == k * (m + n) - k * k
    assert packed.rest.numel() == 0 or float(packed.rest.abs().max()) <= 2.0 + 1e-9
    assert packed.pivots.tolist() == sorted(set(packed.pivots.tolist()))
    assert sorted(packed.pivots.tolist() + packed.others.tolist()) == list(range(m))
    assert torch.equal(packed.others, packed.others.sort().values)
    assert torch.allclose(packed.rows, (B @ A)[packed.pivots], atol=1e-10)


def test_packing_a_truncation_of_full_rank_restores_the_weight():
    W, X = randn(20, 30), inputs(30, 80)
    packed = pack(*truncate(W, X @ X.T).pair(W, 20))
    assert torch.allclose(unpack(packed), W, atol=1e-10) and packed.rest.shape == (0, 20)


@pytest.mark.parametrize("case", ["rank deficient", "zero", "graded", "duplicate rows"])
def test_degenerate_pairs_are_packed_without_loss(case):
    B, A = randn(40, 8), randn(8, 25, seed=1)
    if case == "rank deficient":
        B = randn(40, 3) @ randn(3, 8, seed=2)
    elif case == "zero":
        B = 0.0 * B
    elif case == "graded":
        B = B * torch.logspace(0, -12, 8, dtype=torch.float64)
    else:
        B = B[torch.arange(40) // 10]
    packed = pack(B, A)
    assert torch.isfinite(packed.rest).all() and float(packed.rest.abs().max()) <= 2.0 + 1e-9
    assert torch.allclose(unpack(packed), B @ A, atol=1e-12)


def test_swaps_are_needed_and_made():
    B = torch.linalg.qr(randn(200, 80)).Q
    assert float((B @ torch.linalg.inv(B[lu_pivots(B)])).abs().max()) > 2.5
    packed = pack(B, randn(80, 9, seed=1))
    assert float(packed.rest.abs().max()) <= 2.0 + 1e-9
    assert torch.allclose(unpack(packed), B @ randn(80, 9, seed=1), atol=1e-10)


def test_float32_and_half_precision():
    B, A = randn(30, 9), randn(9, 20, seed=1)
    for dtype, out, tolerance in (
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
    ):
        packed = pack(B.to(dtype), A.to(dtype))
        assert packed.rows.dtype == packed.rest.dtype == out
        exact = B.to(dtype).double() @ A.to(dtype).double()
        assert torch.allclose(unpack(packed).double(), exact, atol=tolerance * float(exact.abs().max()))


def test_bad_pairs():
    with pytest.raises(CorankError, match="does not chain"):
        pack(randn(4, 2), randn(3, 5))
    with pytest.raises(CorankError, match="pivot rows"):
        pack(randn(3, 5), randn(5, 9))
