"""Two-sided CUR: columns C, rows R and a small link M, W' = C M R."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corank.errors import unknown
from corank.factorize.geometry import Factored, Geometry, check_selector
from corank.factors import CUR
from corank.linalg import cur_curve, link, plain_link, range_finder, select

_FROM_BASIS = ("deim", "qdeim", "leverage", "curing-v1", "curing-v2")


@dataclass(frozen=True)
class CURDecomposition:
    """C = W[:, J], R = W[I, :], M from one least squares.

    Attributes:
        selector: how I and J are chosen from the importance matrix.
        importance: "abs" |W| D (CURing's WANDA-like score), "signed" W D, "weight" W; D is the RMS of the inputs.
        weighted: M = C^+ W D (R D)^+, optimal in the geometry; otherwise C^+ W R^+ (CURing v1).
        svd: "exact", or "randomized" (CURing v2: oversampling 20, 2 power iterations).
    """

    kind: ClassVar[str] = "cur"
    selector: str = "deim"
    importance: str = "abs"
    weighted: bool = False
    svd: str = "exact"

    def __post_init__(self) -> None:
        check_selector(self.selector)
        if self.importance not in ("abs", "signed", "weight"):
            raise unknown("importance", self.importance, ("abs", "signed", "weight"))
        if self.svd not in ("exact", "randomized"):
            raise unknown("svd", self.svd, ("exact", "randomized"))

    def _select(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        A = W.abs() if self.importance == "abs" else W
        A = A if self.importance == "weight" else geometry.right.weigh_columns(A)
        if self.selector == "sketch":  # rows by LU of the chosen columns: no SVD anywhere
            J = select(A, rank, "sketch", axis=1, generator=generator)
            return select(A, rank, "deim", axis=0, basis=A[:, J]), J
        if self.selector not in _FROM_BASIS:
            J = select(A, rank, self.selector, axis=1, generator=generator)
            return select(A, rank, self.selector, axis=0, generator=generator), J
        if self.svd == "randomized":
            Q = range_finder(A, min(rank + 20, min(A.shape)), 2, generator)
            P, _, Vt = torch.linalg.svd(Q.T @ A, full_matrices=False)
            P = Q @ P
        else:
            P, _, Vt = torch.linalg.svd(A, full_matrices=False)
        I = select(A, rank, self.selector, axis=0, basis=P[:, :rank])
        return I, select(A, rank, self.selector, axis=1, basis=Vt[:rank].T)

    def curve(self, W: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
        """Loss at every rank of the nested selection."""
        W = W.double()
        I, J = self._select(W, geometry, min(W.shape), generator)
        return cur_curve(W, I, J, geometry.right.G, weighted=self.weighted)

    def factorize(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> Factored:
        """C, M, R; C and R are entries of W."""
        W = W.double()
        I, J = self._select(W, geometry, rank, generator)
        C, R = W[:, J], W[I]
        M = link(C, W, R, geometry.right.G) if self.weighted else plain_link(C, W, R)
        curve = cur_curve(W, I, J, geometry.right.G, weighted=self.weighted)
        return Factored(CUR(C, M, R), float(curve[-1]), curve)
