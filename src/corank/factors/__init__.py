"""Storable kinds of matrices. Each has a frozen dataclass with the data and a layer that computes with it.

| kind | W' | stored values |
|---|---|---|
| `dense` | W | m n |
| `low_rank` | B A | k (m + n) |
| `cur` | C M R | r (m + n) + r^2 |
| `row_pivoted` | k rows, the others from them | k (m + n - k) + k |
| `column_pivoted` | k columns, the others from them | k (m + n - k) + k |
| `shared` | B_i A, A stored by another layer | k m_i |

A pair of factors can also stand in for what is not an nn.Linear; the spec then says in which form:

| form | W | stored as |
|---|---|---|
| `conv` | [out, in * height * width] | two convolutions |
| `embedding` | [d, V] | a narrower table and a matrix |
| `tied` | [d, V], the head's transposed | nothing: it reads the head's factors |
"""

from __future__ import annotations

from corank.factors.base import FactorizedLinear, Factors, linear, product
from corank.factors.column_pivoted import ColumnPivoted, ColumnPivotedLinear
from corank.factors.convolution import FactorizedConv2d, patches
from corank.factors.cur import CUR, CURLinear
from corank.factors.dense import Dense, DenseLinear
from corank.factors.embedding import FactorizedEmbedding, TiedEmbedding, scale_of, wire_tied
from corank.factors.experts import ExpertList, is_stack, put_together, stacked, take_apart, take_apart_for
from corank.factors.low_rank import LowRank, LowRankLinear
from corank.factors.packed import packed
from corank.factors.replace import (
    as_stock,
    is_conv1d,
    layer_for,
    materialise,
    replace,
    shape_of,
    tied_to,
    weight_of,
)
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

#: form -> class of the layer, where it is not a linear one
FORMS: dict[str, type[FactorizedLinear]] = {
    layer.form: layer for layer in (FactorizedConv2d, FactorizedEmbedding, TiedEmbedding)
}

__all__ = [
    "CUR",
    "CURLinear",
    "ColumnPivoted",
    "ColumnPivotedLinear",
    "Dense",
    "DenseLinear",
    "ExpertList",
    "FORMS",
    "FactorizedConv2d",
    "FactorizedEmbedding",
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
    "TiedEmbedding",
    "as_stock",
    "count_shared",
    "is_conv1d",
    "is_stack",
    "layer_for",
    "linear",
    "materialise",
    "packed",
    "patches",
    "product",
    "put_together",
    "replace",
    "scale_of",
    "shape_of",
    "stacked",
    "take_apart",
    "take_apart_for",
    "tied_to",
    "weight_of",
    "wire",
    "wire_tied",
]
