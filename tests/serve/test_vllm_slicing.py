"""Which part of a stored matrix a rank holds, against the whole matrix."""

from __future__ import annotations

import pytest
import torch

from corank.errors import CorankError
from corank.factors import ColumnPivoted, RowPivoted
from corank.serve.vllm import slicing


@pytest.mark.parametrize(
    "total,width,world,starts",
    [
        (12, 12, 1, [0]),
        (12, 3, 4, [0, 3, 6, 9]),
        (6, 3, 4, [0, 0, 3, 3]),  # two key/value heads on four ranks
        (3, 3, 4, [0, 0, 0, 0]),
        (8, 8, 2, [0, 0]),  # a replicated layer
    ],
)
def test_first_row(total, width, world, starts):
    assert [slicing.first_row(total, width, rank, world) for rank in range(world)] == starts


@pytest.mark.parametrize("total,width,world", [(12, 5, 2), (12, 4, 2), (5, 3, 4), (0, 3, 2)])
def test_rows_that_cannot_be_dealt_out(total, width, world):
    with pytest.raises(CorankError, match="cannot be split"):
        slicing.first_row(total, width, 0, world)


def test_rows_of_a_fused_matrix():
    # query: 4 heads, key and value: 2, of size 3, on 4 ranks
    rows = [slicing.rows_of(24, [3, 3, 3], rank, 4, replicas=2).tolist() for rank in range(4)]
    assert rows[0] == [0, 1, 2, 12, 13, 14, 18, 19, 20]
    assert rows[1] == [3, 4, 5, 12, 13, 14, 18, 19, 20]
    assert rows[3] == [9, 10, 11, 15, 16, 17, 21, 22, 23]
    assert slicing.rows_of(10, [2, 3], 1, 2).tolist() == [2, 3, 7, 8, 9]
    assert slicing.rows_of(5, [2, 3], 1, 2).tolist() == [0, 1, 2, 3, 4]  # every rank holds all of it
    with pytest.raises(CorankError, match="does not consist of"):
        slicing.rows_of(11, [2, 3], 1, 2)


@pytest.mark.parametrize("m,k", [(12, 0), (12, 1), (12, 5), (12, 12), (7, 3)])
def test_rows_of_a_row_pivoted_matrix(m, k):
    torch.manual_seed(m + k)
    whole = RowPivoted(torch.randperm(m)[:k].int(), torch.randn(k, 5).double(), torch.randn(m - k, k).double())
    W, held = whole.dense(), 0
    for rows in (*torch.arange(m).chunk(3), torch.randperm(m)[:4]):
        rest, index = slicing.row_pivoted(whole.pivots, whole.rest, rows, m)
        assert torch.equal(torch.cat([whole.rows, rest @ whole.rows])[index], W[rows])
        assert rest.shape[0] == sum(int(row) not in whole.pivots.tolist() for row in rows)  # nothing dense
        held += rest.numel()
    rest, index = slicing.row_pivoted(whole.pivots, whole.rest, torch.arange(m), m)
    assert torch.equal(rest, whole.rest)


@pytest.mark.parametrize("n,k", [(12, 0), (12, 1), (12, 5), (12, 12), (6, 2)])
def test_columns_of_a_column_pivoted_matrix(n, k):
    torch.manual_seed(n + k)
    whole = ColumnPivoted(torch.randperm(n)[:k].int(), torch.randn(7, k).double(), torch.randn(k, n - k).double())
    T, x = whole.pair()[1], torch.randn(n, 4).double()
    total, held = torch.zeros(k, 4).double(), 0
    for rank in range(3):
        start, stop = rank * n // 3, (rank + 1) * n // 3
        take, others, rest = slicing.column_pivoted(whole.pivots, whole.rest, start, stop)
        part = x[start:stop]
        z = torch.cat([part, torch.zeros(1, 4).double()])[take] + rest @ part[others]
        torch.testing.assert_close(z, T[:, start:stop] @ part, rtol=0, atol=1e-14)
        total += z
        held += rest.numel()
    torch.testing.assert_close(whole.columns @ total, whole.dense() @ x, rtol=0, atol=1e-12)
    assert held == whole.rest.numel()  # the ranks together hold what is stored, nothing twice


def test_pivots_that_are_not_distinct():
    with pytest.raises(CorankError, match="distinct"):
        slicing.row_pivoted(torch.tensor([1, 1]), torch.zeros(2, 2), torch.arange(4), 4)
    with pytest.raises(CorankError, match="distinct"):
        slicing.column_pivoted(torch.tensor([1, 9]), torch.zeros(2, 2), 0, 4)
