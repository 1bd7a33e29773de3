"""C-DLN: deep linear networks trained inside the subspace they learn in (Kwon et al., AISTATS 2024, arXiv:2311.05061).

    M = W_L ... W_1 with d x d factors, small orthogonal start: all learning happens in a subspace of dimension 2 r. So:
    M0 = - (gradient of the loss at M = 0) ~ U S V^T;  W_1 = eps V^T [r^, n], W_l = eps I [r^, r^], W_L = eps U [m, r^], r^ = 2 r;
    gradient descent on all factors, the outer two, which are estimates, at a rate `outer_rate` times as large.

For matrix completion M0 = mask * Y / p, for sensing mean_i y_i A_i. Needs: the observations. Trains r^ (m + n) + (L - 2) r^2 values
in place of L d^2. Differs from the reference code (JAX, one rate for one size of problem): the rate is relative to the
curvature that the surrogate predicts, so that the scale of the data does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.linalg.deep import Gradient, descend, product, start


@dataclass
class CompressedDeepLinear:
    """A low-rank matrix from incomplete observations, by a deep linear network of the width that it would use anyway.

    Args:
        rank: r of the matrix sought; the network is 2 r wide.
        depth: L, number of factors.
        scale: eps, size of the start, relative to what each factor of the solution will have.
        outer_rate: rate of the first and the last factor relative to the others.
        rate: relative to the inverse of the predicted curvature; below 2 it is stable on complete observations.
        steps: of gradient descent.
        tolerance: stop when a step changes M by less than this share of it.

    Attributes:
        factors_: W_1 .. W_L once fitted.
        steps_: how many were needed.
    """

    rank: int
    depth: int = 3
    scale: float = 1e-2
    outer_rate: float = 5.0
    rate: float = 0.5
    steps: int = 3000
    tolerance: float = 1e-9
    factors_: list[Tensor] = field(default_factory=list, repr=False)
    steps_: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.depth < 2 or self.steps < 1:
            raise CorankError("rank and steps must be at least 1, and depth at least 2.")
        if not (self.scale > 0 and self.rate > 0 and self.outer_rate > 0):
            raise CorankError("scale, rate and outer_rate must be positive.")

    def fit(self, Y: Tensor, mask: Tensor | None = None) -> CompressedDeepLinear:
        """Complete a matrix.

        Args:
            Y: [m, n]; what the mask hides is ignored.
            mask: [m, n], True where Y was observed; None: everywhere.

        Raises:
            CorankError: nothing was observed, or the mask does not fit.
        """
        seen = torch.ones_like(Y, dtype=torch.bool) if mask is None else mask.bool()
        if seen.shape != Y.shape or not bool(seen.any()):
            raise CorankError(f"The mask must have the shape {list(Y.shape)} of the matrix and hold some True.")
        weight = seen.double() / seen.double().mean()
        known = torch.where(seen, Y, torch.zeros_like(Y)).double()
        return self.descend_from(lambda M: weight * (M - known), Y.shape)

    def fit_sensing(self, operators: Tensor, values: Tensor) -> CompressedDeepLinear:
        """Find a matrix from linear measurements y_i = <A_i, M>.

        Args:
            operators: A [count, m, n], entries of mean square 1.
            values: y [count].

        Raises:
            CorankError: their numbers differ.
        """
        if operators.ndim != 3 or values.shape != operators.shape[:1]:
            raise CorankError(f"Give one value per operator; got {list(values.shape)} for {list(operators.shape)}.")
        A, y = operators.double(), values.double()
        size = torch.Size(operators.shape[1:])
        return self.descend_from(
            lambda M: torch.einsum("i,imn->mn", torch.einsum("imn,mn->i", A, M) - y, A) / len(A), size
        )

    def descend_from(self, gradient: Gradient, shape: torch.Size) -> CompressedDeepLinear:
        """Fit to any loss, given its gradient; the surrogate is what it says of the zero matrix."""
        surrogate = -gradient(torch.zeros(shape, dtype=torch.float64))
        width = min(2 * self.rank, *shape)
        top = float(torch.linalg.matrix_norm(surrogate, 2))
        self.factors_ = start(surrogate, width, self.depth, self.scale * top ** (1 / self.depth))
        if top == 0:  # nothing but zeros was observed
            return self
        # at the solution the product's curvature along the leading direction is the sum over factors of sigma^(2 - 2/L)
        bend = (2 * self.outer_rate + self.depth - 2) * top ** (2 - 2 / self.depth)
        inner = self.rate / bend
        rates = [self.outer_rate * inner, *[inner] * (self.depth - 2), self.outer_rate * inner]
        M = product(self.factors_)
        for step in range(1, self.steps + 1):
            self.steps_ = step
            self.factors_ = descend(self.factors_, gradient, rates)
            before, M = M, product(self.factors_)
            if not torch.isfinite(M).all():
                raise CorankError(f"Gradient descent diverged at rate={self.rate}; give a smaller one.")
            # a small start stands still as well, before it learns: only a product of the size of the data is finished
            done = torch.linalg.matrix_norm(M - before) <= self.tolerance * torch.linalg.matrix_norm(M)
            if bool(done) and float(torch.linalg.matrix_norm(M)) > 0.1 * top:
                break
        return self

    @property
    def numel(self) -> int:
        """Values trained."""
        return sum(factor.numel() for factor in self.factors_)

    def matrix(self) -> Tensor:
        """M [m, n], float64.

        Raises:
            CorankError: not fitted.
        """
        if not self.factors_:
            raise CorankError("Nothing has been fitted yet; call fit first.")
        return product(self.factors_)
