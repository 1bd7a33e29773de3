"""Storable kinds of matrices. Each has a frozen dataclass with the data and a layer that computes with it.

| kind | W' | stored values |
|---|---|---|
| `dense` | W | m n |
| `low_rank` | B A | k (m + n) |
| `cur` | C M R | r (m + n) + r^2 |
| `row_pivoted` | k rows, the others from them | k (m + n - k) + k |
| `column_pivoted` | k columns, the others from them | k (m + n - k) + k |
| `shared` | B_i A, A stored by another layer | k m_i |
"""

from __future__ import annotations

from corank.factors.base import FactorizedLinear, Factors, linear, product
from corank.factors.column_pivoted import ColumnPivoted, ColumnPivotedLinear
from corank.factors.cur import CUR, CURLinear
from corank.factors.dense import Dense, DenseLinear
from corank.factors.low_rank import LowRank, LowRankLinear
from corank.factors.packed import packed
from corank.factors.replace import as_stock, is_conv1d, materialise, replace, shape_of, weight_of
from corank.factors.row_pivoted import RowPivoted, RowPivotedLinear
from corank.factors.shared import SharedBasis, SharedLowRank, SharedLowRankLinear, count_shared, wire

#: kind -> (class of the data, class of the layer)
KINDS: dict[str, tuple[type[Factors], type]] = {
    data.kind: (data, layer)
    for data, layer in (
        (Dense, DenseLinear),
        (LowRank, LowRankLinear),
        (CUR, CURLinear),
        (RowPivoted, RowPivotedLinear),
        (ColumnPivoted, ColumnPivotedLinear),
        (SharedLowRank, SharedLowRankLinear),
    )
}

__all__ = [
    "CUR",
    "CURLinear",
    "ColumnPivoted",
    "ColumnPivotedLinear",
    "Dense",
    "DenseLinear",
    "FactorizedLinear",
    "Factors",
    "KINDS",
    "LowRank",
    "LowRankLinear",
    "RowPivoted",
    "RowPivotedLinear",
    "SharedBasis",
    "SharedLowRank",
    "SharedLowRankLinear",
    "as_stock",
    "count_shared",
    "is_conv1d",
    "linear",
    "materialise",
    "packed",
    "product",
    "replace",
    "shape_of",
    "weight_of",
    "wire",
]
