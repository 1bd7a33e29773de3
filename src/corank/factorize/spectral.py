"""Truncation: the best rank-k matrix in a geometry (all data-aware SVD methods)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corank.factorize.geometry import Factored, Geometry
from corank.factors import LowRank
from corank.linalg import Truncation, truncate


@dataclass(frozen=True)
class Spectral:
    """W' = U_k U_k^T W, U_k the leading eigenvectors of W G W^T: optimal, without an inverse or a Cholesky.

    Attributes:
        precision: "double", or "mixed" (float32 with one float64 Rayleigh-Ritz step).
    """

    kind: ClassVar[str] = "low_rank"
    precision: str = "double"

    def _truncate(self, W: Tensor, geometry: Geometry, rank: int | None = None) -> Truncation:
        metric = geometry.right
        wide = W.shape[0] <= W.shape[1] or metric.G is None or metric.G.ndim == 1 or geometry.R is not None
        root = None if wide else metric.root  # only the tall route needs it; siblings share it
        return truncate(W, metric.G, R=geometry.R, root=root, rank=rank, precision=self.precision)

    def curve(self, W: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
        """Discarded energy at every rank."""
        return self._truncate(W.double(), geometry).loss()

    def factorize(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> Factored:
        """The optimal pair B = U_k, A = U_k^T W."""
        W = W.double()
        truncation = self._truncate(W, geometry, rank)
        B, A = truncation.pair(W, rank)
        curve = truncation.loss()
        return Factored(LowRank(B, A), float(curve[min(rank, len(curve) - 1)]), curve)
