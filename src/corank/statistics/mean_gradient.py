"""The mean gradient of the loss with respect to a weight matrix: what the loss does to first order if W changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.statistics.precision import accumulation
from corank.statistics.statistic import Statistic
from corank.statistics.tokens import blocks, real_tokens


@dataclass(frozen=True, eq=False)
class WeightGradient:
    """D = dL/dW of the mean loss per token: L(W + E) = L(W) + sum_ij D_ij E_ij + O(E^2).

    Attributes:
        D: float64 [m, n].
        count: tokens.
    """

    D: Tensor
    count: int


class MeanGradient(Statistic):
    """Streams `WeightGradient`: ``sum_t g_t x_t^T / T`` (ZS-SVD, arXiv:2602.02848).

    Args:
        m: output features.
        n: input features.
        device: where the sums live. None: where the first batch lives.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "gradients"})
    axes: ClassVar[dict[str, tuple[str, ...]]] = {"sum_gx": ("m", "n")}

    def __init__(self, m: int, n: int, device: torch.device | str | None = None) -> None:
        super().__init__({"m": m, "n": n}, device)
        self.m, self.n = m, n

    def update(self, x: Tensor, g: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: inputs [..., n].
            g: gradients of the summed loss at the outputs [..., m], of the same tokens.
            mask: [...], True at real tokens; None: all are real.

        Raises:
            CorankError: shapes that do not match, wrong dtype or mask.
            NonFinite: NaN or infinity in a real token; nothing has been added.
        """
        if x.shape[:-1] != g.shape[:-1]:
            raise CorankError(
                f"The mean gradient needs inputs [..., {self.n}] and gradients [..., {self.m}] of the same tokens; got "
                f"{tuple(x.shape)} and {tuple(g.shape)}."
            )
        with accumulation(x.device):
            inputs = real_tokens(x, mask, self.n, "inputs")
            gradients = real_tokens(g, mask, self.m, "gradients").to(inputs.device)
            for u, v in blocks(gradients, inputs):
                self._add("sum_gx", (u.T @ v).double())
            self.count += len(inputs)

    def result(self) -> WeightGradient:
        """Raises CorankError if no token was seen."""
        return WeightGradient(self._mean("sum_gx"), self.count)
