"""Truncation: the best rank-k matrix in a geometry (all data-aware SVD methods)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corank.errors import unknown
from corank.factorize.geometry import Factored, Geometry
from corank.factors import LowRank
from corank.linalg import Truncation, truncate


@dataclass(frozen=True)
class Spectral:
    """W' = U_k U_k^T W, U_k the leading eigenvectors of W G W^T: optimal, without an inverse or a Cholesky.

    Attributes:
        precision: "double"; "mixed", float32 with a float64 repair of what float32 cannot resolve, about a third faster;
            or "auto": double for float64 weights, mixed otherwise.
    """

    kind: ClassVar[str] = "low_rank"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "double", "mixed"):
            raise unknown("precision", self.precision, ("auto", "double", "mixed"))

    def decompose(self, W: Tensor, geometry: Geometry, rank: int | None = None) -> Truncation:
        """The truncations of W [m, n] at every rank, or up to `rank`."""
        precision = self.precision
        if precision == "auto":
            precision = "double" if W.dtype == torch.float64 else "mixed"
        return truncate(W, geometry.right.G, R=geometry.R, rank=rank, precision=precision)

    def curve(self, W: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
        """Discarded energy at every rank."""
        return self.decompose(W, geometry).loss()

    def factorize(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> Factored:
        """The optimal pair B = U_k, A = U_k^T W."""
        return self.cut(W, self.decompose(W, geometry, rank), rank)

    def cut(self, W: Tensor, truncation: Truncation, rank: int) -> Factored:
        """The optimal pair of rank `rank` out of a decomposition of W."""
        B, A = truncation.pair(W, rank)
        curve = truncation.loss()
        return Factored(LowRank(B, A), float(curve[min(rank, len(curve) - 1)]), curve)
