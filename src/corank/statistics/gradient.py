"""The Gram matrix of the gradients at a layer's output: the output metric of two-sided methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from corank.statistics.gram import self_product, shrunk, symmetric
from corank.statistics.precision import accumulation
from corank.statistics.statistic import Statistic
from corank.statistics.tokens import blocks, real_tokens


@dataclass(frozen=True, eq=False)
class OutputMetric:
    """Second moment of g = dLoss/dy over T tokens.

    Attributes:
        R: float64 [m, m], (1/T) sum_t g_t g_t^T, exactly symmetric.
        count: T.
    """

    R: Tensor
    count: int

    def diagonal(self) -> Tensor:
        """``diag(R)`` [m]."""
        return self.R.diagonal().clone()

    def shrink(self, alpha: float) -> OutputMetric:
        """``(1 - alpha) R + alpha mean(diag R) I``; 0.3 in KFAC-SVD."""
        return replace(self, R=shrunk(self.R, alpha))


class GradientGram(Statistic):
    """Streams `OutputMetric`: R = E[g g^T] (KFAC-SVD, GFWSVD).

    Args:
        m: output features.
        device: where the sums live. None: where the first batch lives.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    axes: ClassVar[dict[str, tuple[str, ...]]] = {"sum_gg": ("m", "m")}

    def __init__(self, m: int, device: torch.device | str | None = None) -> None:
        super().__init__({"m": m}, device)
        self.m = m

    def update(self, g: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            g: gradients at the output [..., m]. If the loss is a mean over tokens, multiply by their number,
                or R depends on how the data were batched.
            mask: [...], True at real tokens; None: all are real.

        Raises:
            CorankError: wrong width, dtype or mask.
            NonFinite: NaN or infinity in a real token; nothing has been added.
        """
        with accumulation(g.device):
            rows = real_tokens(g, mask, self.m, "gradients")
            for (block,) in blocks(rows):
                self._add("sum_gg", self_product(block))
            self.count += len(rows)

    def result(self) -> OutputMetric:
        """Raises CorankError if no token was seen."""
        return OutputMetric(symmetric(self._mean("sum_gg")), self.count)
