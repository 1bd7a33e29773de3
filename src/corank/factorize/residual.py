"""Truncation in two stages: a part of the rank for what the data weigh, the rest for what is left of the weight itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corank.errors import CorankError, unknown
from corank.factorize.geometry import Factored, Geometry
from corank.factorize.spectral import Spectral
from corank.factors import LowRank
from corank.linalg import Truncation

KNOTS = 65
"""Ranks at which a curve is computed; between them it is interpolated."""


@dataclass(frozen=True)
class TwoStage:
    """W' = W1 + W2: W1 the truncation of W in the geometry, at a share of the rank, W2 the truncation of W - W1.

    With the geometry of the data in both stages W' is the truncation of W at the whole rank. A plain second stage fits
    directions that the data do not show.

    Attributes:
        share: part of the rank that the first stage gets (rounded).
        second: geometry of the second stage, "plain" or "data".
        precision: as of `Spectral`.
    """

    kind: ClassVar[str] = "low_rank"
    share: float = 0.95
    second: str = "plain"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise CorankError(f"share={self.share} is not a part of the rank; give a number between 0 and 1.")
        if self.second not in ("plain", "data"):
            raise unknown("second stage", self.second, ("plain", "data"))
        Spectral(self.precision)

    def first(self, rank: int) -> int:
        """Rank of the first stage."""
        return min(round(self.share * rank), rank)

    def _stages(self, W: Tensor, geometry: Geometry, rank: int, truncation: Truncation) -> tuple[Tensor, Tensor]:
        k = self.first(rank)
        B, A = truncation.pair(W, k)
        if k == rank:
            return B, A
        residual = W - B @ A
        after = Spectral(self.precision).decompose(residual, self._geometry(geometry), rank - k)
        # a singular output metric may leave fewer directions than ranks
        more = after.pair(residual, min(rank - k, after.up.shape[1]))
        return torch.cat([B, more[0]], 1), torch.cat([A, more[1]])

    def _geometry(self, geometry: Geometry) -> Geometry:
        return geometry if self.second == "data" else Geometry()

    def curve(self, W: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
        """Loss at every rank: exact where min(m, n) < 65, else at 65 ranks, and linear in between."""
        top = min(W.shape)
        ranks = sorted({round(i * top / (KNOTS - 1)) for i in range(KNOTS)}) if top >= KNOTS else list(range(top + 1))
        truncation = Spectral(self.precision).decompose(W, geometry)
        known = [geometry.loss(W)]
        for rank in ranks[1:]:
            B, A = self._stages(W, geometry, rank, truncation)
            known.append(geometry.loss(W - B @ A))
        out = torch.empty(top + 1, dtype=torch.float64)
        for (a, high), (b, low) in zip(
            zip(ranks, known, strict=True), zip(ranks[1:], known[1:], strict=True), strict=False
        ):
            out[a : b + 1] = torch.linspace(high, low, b - a + 1, dtype=torch.float64)
        return out if top else torch.tensor(known, dtype=torch.float64)

    def factorize(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> Factored:
        """The factors of both stages side by side."""
        first = Spectral(self.precision).decompose(W, geometry, self.first(rank))
        B, A = self._stages(W, geometry, rank, first)
        return Factored(LowRank(B, A), geometry.loss(W - B @ A))
