"""Meeting a sparsity by two multipliers (Wang et al., arXiv:1910.04732; Compresso, arXiv:2310.05015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Lagrangian:
    """l1 (s - t) + l2 (s - t)^2: least over the gates, largest over l1 and l2, which are trained by gradient ascent.

    While the sparsity s is below its target t, l1 falls, and the term rewards more sparsity.

    Args:
        target: t at the end, the share of parameters that is to go.
        warm: steps over which the target rises from 0.

    Attributes:
        multipliers: [l1, l2].
    """

    def __init__(self, target: float, warm: int = 0):
        self.target, self.warm = target, warm
        self.multipliers = nn.Parameter(torch.zeros(2))

    def goal(self, step: int) -> float:
        """t at a step."""
        return self.target * min(1.0, (step + 1) / self.warm) if self.warm > 0 else self.target

    def __call__(self, sparsity: Tensor, step: int) -> Tensor:
        """The term of the loss.

        Args:
            sparsity: s, a scalar that is differentiable in the gates.
            step: number of the step, from 0.
        """
        gap = sparsity - self.goal(step)
        l1, l2 = self.multipliers.to(gap)
        return l1 * gap + l2 * gap.square()

    def parameters(self) -> dict[str, nn.Parameter]:
        """For `corank.gates.train(beside=...)`, together with a negative rate: "lagrangian" -> multipliers."""
        return {"lagrangian": self.multipliers}
