"""Interpolative decompositions: keep some columns (or rows) of W and express the others through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corank.factorize.geometry import Factored, Geometry, check_selector
from corank.factors import ColumnPivoted, RowPivoted
from corank.factors.pivots import complement
from corank.linalg import column_curve, column_id, row_curve, row_id, select


@dataclass(frozen=True)
class ColumnID:
    """W' = C T, C = W[:, J]: the layer keeps r input channels and predicts the others' contribution from them.

    T = C^+ W is optimal for every input metric once J is chosen. J comes from the columns of W D, D the RMS of the inputs.
    """

    kind: ClassVar[str] = "column_pivoted"
    selector: str = "qr"

    def __post_init__(self) -> None:
        check_selector(self.selector)

    def _select(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> Tensor:
        return select(geometry.right.weigh_columns(W), rank, self.selector, axis=1, generator=generator)

    def curve(self, W: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
        """Loss at every rank of the nested selection."""
        W = W.double()
        return column_curve(W, self._select(W, geometry, min(W.shape), generator), geometry.right.G)

    def factorize(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> Factored:
        """Columns J, and T with an identity block at J."""
        W = W.double()
        J = self._select(W, geometry, rank, generator)
        T = column_id(W, J)
        curve = column_curve(W, J, geometry.right.G)
        factors = ColumnPivoted(J, W[:, J], T[:, complement(J, W.shape[1])])
        return Factored(factors, float(curve[-1]), curve)


@dataclass(frozen=True)
class RowID:
    """W' = Z R, R = W[I, :]: r outputs are computed exactly, the others are combinations of them.

    I comes from the rows of W S, and Z = W G R^T (R G R^T)^+ is the least-squares fit in the input metric.
    """

    kind: ClassVar[str] = "row_pivoted"
    selector: str = "qr"

    def __post_init__(self) -> None:
        check_selector(self.selector)

    def _select(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> Tensor:
        A = geometry.right.weigh(W)
        if A.shape[1] < min(
            W.shape
        ):  # fewer directions seen than rows wanted: where they are exhausted, W itself decides
            scale = torch.linalg.matrix_norm(A) / torch.linalg.matrix_norm(W).clamp_min(torch.finfo(W.dtype).tiny)
            A = torch.cat([A, W * (1e-6 * scale).clamp_min(torch.finfo(W.dtype).tiny)], dim=1)
        return select(A, rank, self.selector, axis=0, generator=generator)

    def curve(self, W: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
        """Loss at every rank of the nested selection."""
        W = W.double()
        return row_curve(W, self._select(W, geometry, min(W.shape), generator), geometry.right.G)

    def factorize(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> Factored:
        """Rows I, and Z with an identity block at I."""
        W = W.double()
        I = self._select(W, geometry, rank, generator)
        Z = row_id(W, I, geometry.right.G)
        curve = row_curve(W, I, geometry.right.G)
        factors = RowPivoted(I, W[I], Z[complement(I, W.shape[0])])
        return Factored(factors, float(curve[-1]), curve)
