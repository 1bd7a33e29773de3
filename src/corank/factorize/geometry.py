"""The geometry in which a factorization is measured, and what a factorizer is."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from corank.errors import unknown
from corank.linalg import SELECTORS, apply_root, psd_root


@dataclass(frozen=True, eq=False)
class Metric:
    """Second moment of a layer's inputs. Siblings share one object, so that its root is computed once.

    Attributes:
        G: [n, n] symmetric positive semidefinite, [n] for a diagonal one, or None for the identity. float64.
        shrink: weight of the identity in G if G is the (shrunk) second moment of the inputs, None if it is anything else.
    """

    G: Tensor | None = None
    shrink: float | None = None

    @cached_property
    def root(self) -> Tensor | None:
        """S with G = S S^T ([n, p], or [n] for a diagonal G)."""
        return None if self.G is None else psd_root(self.G)

    @property
    def diagonal(self) -> Tensor | None:
        """diag(G) [n], None for the identity."""
        return self.G.diagonal() if self.G is not None and self.G.ndim == 2 else self.G

    def apply(self, W: Tensor) -> Tensor:
        """W G for W [m, n]."""
        if self.G is None:
            return W
        return W * self.G.to(W.dtype) if self.G.ndim == 1 else W @ self.G.to(W.dtype)

    def weigh(self, W: Tensor) -> Tensor:
        """W S for W [m, n]."""
        return W if self.root is None else apply_root(W, self.root.to(W.dtype))

    def weigh_columns(self, W: Tensor) -> Tensor:
        """W D with D = diag(G)^{1/2}: each column scaled by the RMS of its input."""
        return W if self.diagonal is None else W * self.diagonal.clamp_min(0).sqrt().to(W.dtype)


IDENTITY = Metric()


@dataclass(frozen=True, eq=False)
class Geometry:
    """The loss of W' in place of W is ``|| L (W - W') S ||_F^2`` with G = S S^T and R = L^T L.

    Attributes:
        right: the metric G of the inputs.
        R: [m, m] metric of the outputs, None for the identity.
        mean: [n] mean input. If given, G is about this mean and the layer's bias absorbs the rest:
            b' = b + (W - W') mean (the affine form of LoRD and AFM).
    """

    right: Metric = field(default=IDENTITY)
    R: Tensor | None = None
    mean: Tensor | None = None

    def loss(self, E: Tensor) -> float:
        """``|| L E S ||_F^2`` of an error E [m, n], in the dtype of E."""
        RE = E if self.R is None else self.R.to(E.dtype) @ E
        return max(float((RE * self.right.apply(E)).sum(dtype=torch.float64)), 0.0)


@dataclass(frozen=True, eq=False)
class Factored:
    """A factorization and what is known about it.

    Attributes:
        factors: one of `corank.factors`.
        predicted: the loss that theory says it has in its geometry.
        curve: [p+1] predicted losses at the ranks 0..p from the same decomposition, None if unknown.
    """

    factors: Any
    predicted: float
    curve: Tensor | None = None


class Factorizer(Protocol):
    """A rule that turns W into factors. `kind` is the storage it produces."""

    kind: ClassVar[str]

    def curve(self, W: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
        """Losses [p+1] at every rank 0..p, p = min(m, n)."""
        ...

    def factorize(self, W: Tensor, geometry: Geometry, rank: int, generator: torch.Generator) -> Factored:
        """Factors of rank `rank` of W [m, n]."""
        ...


def check_selector(name: str) -> None:
    """Raise CorankError, naming the nearest ones, unless `name` is a selector."""
    if name not in SELECTORS:
        raise unknown("selector", name, SELECTORS)
