"""Storing a rank-k matrix as k of its own rows and the coefficients of the others: k (m + n - k) values.

This is PIFA (arXiv:2501.19090), the interpolative form of an already chosen low-rank pair: it saves exactly
k^2 values and k^2 multiplications per input vector over the pair, and breaks even at full rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.linalg.operands import matrix, work_dtype
from corank.linalg.selection import lu_pivots, maxvol


@dataclass(frozen=True)
class Packed:
    """D = B A [m, n] with D[pivots] = rows and D[others] = rest @ rows.

    Attributes:
        pivots: int64 [k], ascending.
        rows: [k, n].
        rest: [m - k, k], entries of size at most 2.
    """

    pivots: Tensor
    rows: Tensor
    rest: Tensor

    @property
    def others(self) -> Tensor:
        """int64 [m - k], ascending: the rows that are combinations of the stored ones."""
        free = torch.ones(len(self.pivots) + self.rest.shape[0], dtype=torch.bool, device=self.pivots.device)
        free[self.pivots] = False
        return free.nonzero()[:, 0]


def pack(B: Tensor, A: Tensor) -> Packed:
    """Rewrite the pair B A by k pivot rows, chosen so that no coefficient exceeds 2.

    Pivots are the LU pivots of Q = qr(B).Q, improved by maximum-volume swaps until the bound holds. The
    interpolation depends on the range of B only, so a B of deficient rank needs no special case. Pivoted QR
    as a start would save the one or two swaps and cost a hundred times the LU.

    Args:
        B: [m, k], k <= m, any rank.
        A: [k, n].

    Returns:
        Packed in the dtype of B (float32 for half precisions); the work is float64.

    Raises:
        CorankError: shapes that do not chain, k > m, NaN or infinity.

    Source: PIFA (arXiv:2501.19090); the swap bound is that of strong rank-revealing QR (Gu and Eisenstat
    1996).
    """
    matrix("B", B)
    matrix("A", A)
    m, k = B.shape
    if A.shape[0] != k:
        raise CorankError(f"B A does not chain: B is {list(B.shape)}, A is {list(A.shape)}.")
    if k > m:
        raise CorankError(f"A matrix with {m} rows cannot have {k} pivot rows; reduce the rank to at most {m}.")
    B64 = B.double()
    Q = torch.linalg.qr(B64).Q
    pivots, F = maxvol(Q, lu_pivots(Q), tolerance=2.0)
    pivots, order = torch.sort(pivots)
    others = torch.ones(m, dtype=torch.bool, device=B.device)
    others[pivots] = False
    dtype = work_dtype(B)
    return Packed(pivots, (B64[pivots] @ A.double()).to(dtype), F[others][:, order].to(dtype))


def unpack(packed: Packed) -> Tensor:
    """The dense matrix [m, n] of a Packed: gather of the stored rows and their combinations."""
    k, n = packed.rows.shape
    D = packed.rows.new_empty(k + packed.rest.shape[0], n)
    D[packed.pivots] = packed.rows
    D[packed.others] = packed.rest @ packed.rows
    return D
