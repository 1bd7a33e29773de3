"""The input Gram matrix: uncentred second moment and mean of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.statistics.precision import accumulation
from corank.statistics.statistic import Statistic
from corank.statistics.tokens import blocks, real_tokens


def shrunk(G: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) G + alpha mean(diag G) I``: shrinkage towards white inputs, free of scale.

    Args:
        G: [n, n].
        alpha: in [0, 1]; 0.1 for inputs and 0.3 for output gradients in KFAC-SVD.

    Raises:
        CorankError: if alpha is outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise CorankError(f"Shrinkage {alpha} is outside [0, 1]; 0.1 is a usual value.")
    out = G * (1.0 - alpha)
    out.diagonal().add_(alpha * G.diagonal().mean())
    return out


def self_product(X: Tensor, panels: int = 4) -> Tensor:
    """X^T X for X [T, n], computing the lower triangle only, in panels: (1 + 1/panels)/2 of the multiplications."""
    n = X.shape[1]
    if n < 256:
        return X.T @ X
    width = -(-n // panels)
    out = X.new_empty(n, n)
    for start in range(0, n, width):
        stop = min(start + width, n)
        out[start:, start:stop] = X[:, start:].T @ X[:, start:stop]
        out[start:stop, stop:] = out[stop:, start:stop].T
    return out


def symmetric(G: Tensor) -> Tensor:
    """The symmetric part; matrix products return X^T X symmetric only up to rounding."""
    return (G + G.T) / 2


@dataclass(frozen=True, eq=False)
class Gram:
    """Second moment of the inputs x of a layer over T tokens.

    Attributes:
        G: float64 [n, n], (1/T) sum_t x_t x_t^T, uncentred, exactly symmetric.
        mean: float64 [n], (1/T) sum_t x_t.
        count: T.
    """

    G: Tensor
    mean: Tensor
    count: int

    def centred(self) -> Gram:
        """The Gram of x - mean: ``G - mean mean^T``, with mean zero.

        For the affine problem, whose bias is ``b + (W - W') mean`` with the mean of the original. Centre
        first and shrink afterwards.
        """
        G = self.G - torch.outer(self.mean, self.mean)
        G.diagonal().clamp_(min=0)  # a constant channel has variance zero, not minus one rounding error
        return Gram(G, torch.zeros_like(self.mean), self.count)

    def diagonal(self) -> Tensor:
        """``diag(G)`` as a diagonal metric [n]: the mean square of each input."""
        return self.G.diagonal().clone()

    def shrink(self, alpha: float) -> Gram:
        """The same with ``G`` shrunk, see `shrunk`."""
        return replace(self, G=shrunk(self.G, alpha))


class InputGram(Statistic):
    """Streams `Gram`: G = E[x x^T], mean and token count.

    One float32 product per block of tokens, summed in float64 (float64 inputs: float64 throughout). From
    inputs below float64, eigenvalues under about 1e-7 of the largest are therefore rounding, of either
    sign: cut there, not at the float64 epsilon, before inverting.

    Args:
        n: input features.
        device: where the sums live. None: where the first batch lives.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    axes: ClassVar[dict[str, tuple[str, ...]]] = {"sum_xx": ("n", "n"), "sum_x": ("n",)}

    def __init__(self, n: int, device: torch.device | str | None = None) -> None:
        super().__init__({"n": n}, device)
        self.n = n

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: inputs [..., n], any floating dtype.
            mask: [...], True at real tokens; None: all are real.

        Raises:
            CorankError: wrong width, dtype or mask.
            NonFinite: NaN or infinity in a real token; nothing has been added.
        """
        with accumulation(x.device):
            rows = real_tokens(x, mask, self.n, "inputs")
            for (block,) in blocks(rows):
                self._add("sum_xx", self_product(block))
                self._add("sum_x", block.sum(0, dtype=torch.float64))
            self.count += len(rows)

    def result(self) -> Gram:
        """Raises CorankError if no token was seen."""
        return Gram(symmetric(self._mean("sum_xx")), self._mean("sum_x"), self.count)
