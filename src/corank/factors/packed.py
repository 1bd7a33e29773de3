"""Any rank-k matrix as a row-pivoted one: lossless, k (m + n - k) + k values instead of k (m + n)."""

from __future__ import annotations

import torch

from corank.factors.base import Factors
from corank.factors.row_pivoted import RowPivoted


def packed(factors: Factors) -> RowPivoted:
    """Choose k pivot rows of W' = B A and express the other rows by them (PIFA, arXiv:2501.19090).

    Lossless in exact arithmetic. Pack before casting to 16 bits: rounding rows and coefficients costs about
    twice the error of rounding B and A, and packing what has been rounded already adds to it.

    Args:
        factors: any kind; fp32 and fp64 are worked on as they are, 16-bit factors in fp32.

    Returns:
        `RowPivoted` in the dtype of `factors` with (B A)[pivots] = rows and (B A)[others] = rest @ rows.
    """
    from corank.linalg.packing import pack

    if isinstance(factors, RowPivoted):
        return factors
    wide = torch.promote_types(factors.dtype, torch.float32)
    result = pack(*(tensor.to(wide) for tensor in factors.pair()))
    return RowPivoted(result.pivots.to(torch.int32), result.rows, result.rest).astype(factors.dtype)
