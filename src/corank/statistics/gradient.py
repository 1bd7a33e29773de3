"""The Gram matrix of the gradients at a layer's output: the output metric of two-sided methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.statistics.gram import self_product, shrunk, symmetric
from corank.statistics.precision import accumulation
from corank.statistics.statistic import Statistic
from corank.statistics.tokens import as_mask, blocks, real_tokens


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


TRIM = 1 / 8
"""Share of each sequence that is left out at either end."""
CLIP = (0.1, 10.0)
"""Bounds of a token's gradient norm, in multiples of the mean norm of its sequence."""


class ClippedGradientGram(Statistic):
    """Streams `OutputMetric` robustly, as KFAC-SVD does: inner tokens only, and no token dominates.

    The first and last eighth of every sequence are left out, and each gradient is rescaled so that its norm
    lies within 0.1 to 10 times the mean norm of its sequence. (The reference takes the mean over a batch,
    which makes the result depend on how sequences are batched.)

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
            g: gradients at the output [batch, tokens, m].
            mask: [batch, tokens], True at real tokens; None: all are real.

        Raises:
            CorankError: wrong shape, dtype or mask.
            NonFinite: NaN or infinity in a real token; nothing has been added.
        """
        if g.ndim != 3:
            raise CorankError(f"The gradients have shape {tuple(g.shape)}; [batch, tokens, {self.m}] is needed here.")
        real_tokens(g, mask, self.m, "gradients")  # refuses what is not finite
        real = None if mask is None else as_mask(mask, g.shape[:-1])
        rows = [clipped(s if real is None else s[real[i].to(s.device)]) for i, s in enumerate(g.detach())]
        with accumulation(g.device):
            for (block,) in blocks(torch.cat(rows)):
                self._add("sum_gg", self_product(block))
            self.count += sum(len(r) for r in rows)

    def result(self) -> OutputMetric:
        """Raises CorankError if no token was seen."""
        return OutputMetric(symmetric(self._mean("sum_gg")), self.count)


def clipped(g: Tensor) -> Tensor:
    """Inner tokens of one sequence, with norms clipped: [tokens, m] -> [tokens - 2 floor(tokens/8), m]."""
    edge = int(len(g) * TRIM)
    g = g[edge : len(g) - edge]
    norm = torch.linalg.vector_norm(g.double(), dim=1, keepdim=True)
    mean = norm.mean()
    wanted = norm.clamp(CLIP[0] * mean, CLIP[1] * mean)
    return g * torch.where(norm > 0, wanted / norm.clamp_min(torch.finfo(torch.float64).tiny), 0.0).to(g.dtype)
