"""Random factors of every kind with the matrix each stands for, built from the definitions alone."""

from __future__ import annotations

import torch

from corank.factors import CUR, ColumnPivoted, Dense, Factors, LowRank, RowPivoted, SharedLowRank

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)]
SIZES = [(m, n, k) for m, n in SHAPES for k in sorted({0, 1, min(m, n) - 1, min(m, n)})]


def make(kind: str, m: int, n: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[Factors, torch.Tensor]:
    """(factors, W)."""
    torch.manual_seed(1000 * m + 10 * n + k)
    rand = lambda *size: torch.randn(*size, dtype=dtype)  # noqa: E731
    if kind == "dense":
        W = rand(m, n)
        return Dense(W), W
    if kind == "low_rank":
        B, A = rand(m, k), rand(k, n)
        return LowRank(B, A), B @ A
    if kind == "shared":
        B, A = rand(m, k), rand(k, n)
        return SharedLowRank(B, A, "owner"), B @ A
    if kind == "cur":
        C, M, R = rand(m, k), rand(k, k), rand(k, n)
        return CUR(C, M, R), C @ M @ R
    if kind == "row_pivoted":
        pivots, rows, rest = torch.randperm(m)[:k], rand(k, n), rand(m - k, k)
        W, row = torch.zeros(m, n, dtype=dtype), 0
        for i in range(m):
            if i in pivots.tolist():
                W[i] = rows[pivots.tolist().index(i)]
            else:
                W[i], row = rest[row] @ rows, row + 1
        return RowPivoted(pivots.int(), rows, rest), W
    pivots, columns, rest = torch.randperm(n)[:k], rand(m, k), rand(k, n - k)
    W, column = torch.zeros(m, n, dtype=dtype), 0
    for j in range(n):
        if j in pivots.tolist():
            W[:, j] = columns[:, pivots.tolist().index(j)]
        else:
            W[:, j], column = columns @ rest[:, column], column + 1
    return ColumnPivoted(pivots.int(), columns, rest), W
