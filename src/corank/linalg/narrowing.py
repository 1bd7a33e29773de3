"""Doing without inputs of a matrix, at every number of them: what is lost in both metrics, and what is left to be stored.

W [m, n] reads z in R^n; n is made of units, neighbours that stay or go together. With C = E[z z^T] the metric of z and R
that of the outputs, keeping z_J and fitting the matrix that reads it costs

    loss(J) = min over V of tr(R (W - V S_J) C (W - V S_J)^T),    V = W C[:, J] C_JJ^+  for every R

(S_J selects). With C = L L^T in an order in which the units of J come first, the part of z that z_J does not explain is
made of the columns of L behind them, so that one Cholesky gives the loss of all the leading sets of an order:

    loss(k) = sum over j > k of || R^{1/2} W L_j ||^2.

V is a projection: whatever is then put in the place of V, say F, loses loss(J) + tr(R (V - F) C_JJ (V - F)^T), nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corank.errors import CorankError, unknown
from corank.linalg.least_squares import column_least_squares, removal_order, ridge_leverage
from corank.linalg.roots import psd_root

ORDERS = ("greedy", "leverage")
RIDGES = (0.0, 1e-14, 1e-12, 1e-10, 1e-8)
"""Relative ridges that are tried one after another until a second moment, singular up to rounding, has a Cholesky factor."""


@dataclass(frozen=True, eq=False)
class Nested:
    """An order of units, and what is lost if only the first k of them stay.

    Attributes:
        order: int64 [units], the one that stays longest first.
        loss: float64 [units + 1], loss[k] with the first k; never rising, loss[units] = 0.
    """

    order: Tensor
    loss: Tensor

    def kept(self, k: int) -> Tensor:
        """The first k units, ascending: int64 [k]."""
        return self.order[:k].sort().values


def columns_of(units: Tensor, size: int) -> Tensor:
    """The columns of units of `size` neighbours: int64 [len(units) * size]."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def nested_units(W: Tensor, C: Tensor, R: Tensor | None = None, size: int = 1, how: str = "greedy") -> Nested:
    """Put the units of an input in an order, and say what is lost at every number of them.

    Args:
        W: [m, n].
        C: metric of the input, [n, n], [n] (diagonal), or None for the identity.
        R: metric of the outputs [m, m], None for the identity.
        size: columns of a unit.
        how: "greedy": the unit whose removal costs least goes first, the others take over what they can, and so on (the
            Optimal Brain Surgeon on columns, in both metrics); "leverage": ridge leverage scores, which do not look at W.

    Raises:
        CorankError: unknown order, or units that do not divide the input.
    """
    if how not in ORDERS:
        raise unknown("order of units", how, ORDERS)
    n = W.shape[1]
    if n % size:
        raise CorankError(f"{n} inputs are no units of {size}.")
    W, C = W.double(), full(C, W)
    if how == "greedy":
        order = removal_order(W, C, n // size, size, ridge=1e-10, R=R).flip(0)
    else:
        order = ridge_leverage(C).view(-1, size).sum(1).argsort(descending=True, stable=True)
    return Nested(order, Leading.of(W, C, order, size).losses(R))


def full(C: Tensor | None, W: Tensor) -> Tensor:
    """The metric of the inputs of W [m, n] as a matrix: float64 [n, n]."""
    if C is None:
        return torch.eye(W.shape[1], dtype=torch.float64, device=W.device)
    return torch.diag(C.double()) if C.ndim == 1 else C.double()


@dataclass(frozen=True, eq=False)
class Leading:
    """The matrices V of all the leading sets of an order, from one Cholesky factor: V = (W L)[:, :k] L[:k, :k]^-1.

    Attributes:
        order: int64 [units].
        size: columns of a unit.
        L: float64 [n, n] of C in this order; a zero if nothing was ever seen.
        A: W L [m, n].
        exact: whether C was well conditioned, so that a triangular solve is what least squares would give.
    """

    order: Tensor
    size: int
    L: Tensor
    A: Tensor
    exact: bool

    @classmethod
    def of(cls, W: Tensor, C: Tensor, order: Tensor, size: int = 1) -> Leading:
        """Take the factor.

        Args:
            W: [m, n].
            C: [n, n].
            order: int64 [units], all of them.
            size: columns of a unit.
        """
        columns = columns_of(order, size)
        moment = C.double()[columns][:, columns]
        for ridge in RIDGES:
            damped = moment
            if ridge:
                damped = moment.clone()
                damped.diagonal().add_(ridge * moment.diagonal().mean())
            L, info = torch.linalg.cholesky_ex(damped)
            if int(info) == 0:
                # of unit channels, what each adds to those before it
                own = L.diagonal() / moment.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
                return cls(order, size, L, W.double()[:, columns] @ L, ridge == 0 and float(own.min()) > DOUBTFUL)
        return cls(order, size, torch.zeros_like(moment), W.new_zeros(W.shape, dtype=torch.float64), False)

    def losses(self, R: Tensor | None) -> Tensor:
        """What is lost if only the first k units stay: float64 [units + 1].

        Args:
            R: metric of the outputs [m, m], None for the identity.
        """
        energy = (self.A * (self.A if R is None else R.double() @ self.A)).sum(0).clamp_min(0)
        per_unit = energy.view(-1, self.size).sum(1)
        return torch.cat([per_unit, per_unit.new_zeros(1)]).flip(0).cumsum(0).flip(0)

    def matrix(self, k: int) -> Tensor | None:
        """V [m, k * size] of the first k units, in ascending order of these; None if C was not well conditioned."""
        if not self.exact:
            return None
        n = k * self.size
        V = torch.linalg.solve_triangular(self.L[:n, :n], self.A[:, :n], upper=False, left=False)
        return V[:, columns_of(self.order[:k].argsort(), self.size)]


DOUBTFUL = 1e-5
"""A channel of unit power of which the others leave less than this unexplained is not solved for by substitution."""


def narrowed(W: Tensor, C: Tensor | None, columns: Tensor) -> Tensor:
    """V [m, k] float64, the matrix of the columns that stay which comes nearest to W in the metric of the inputs."""
    return column_least_squares(W, full(C, W), columns)


def spectral_losses(
    W: Tensor, G: Tensor | None, R: Tensor | None, root: Tensor | None = None, left: Tensor | None = None
) -> Tensor:
    """Losses of the best approximation of W [m, n] at every rank, without its vectors: float64 [min(m, n) + 1].

    The eigenvalues that `corank.linalg.truncate` finds, from the smaller of the two products that share them, so that no
    root of a large metric is needed. The larger products are made in the dtype of W.

    Args:
        W: [m, n].
        G: metric of the inputs [n, n] or [n], None for the identity.
        R: metric of the outputs [m, m] or [m], None for the identity.
        root: psd_root(G), if it is known; used for m > n.
        left: psd_root(R), if it is known; used for m <= n.
    """
    m, n = W.shape
    if m > n:
        inner = (W.T @ _applied(R, W)).double()
        S = psd_root(G.double()) if root is None and G is not None else root
    else:
        inner = (W @ _applied(G, W.T)).double()
        S = psd_root(R.double()) if left is None and R is not None else left
    if S is not None:
        S = S.double()
        inner = inner * S * S[:, None] if S.ndim == 1 else S.T @ inner @ S
    energy = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0)  # ascending: summed from the small end
    tail = torch.cat([energy.new_zeros(1), energy]).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(min(m, n) + 1 - len(tail))])


def _applied(M: Tensor | None, A: Tensor) -> Tensor:
    """M A for a metric M, in the dtype of A."""
    if M is None:
        return A
    return A * M.to(A.dtype)[:, None] if M.ndim == 1 else M.to(A.dtype) @ A
