"""Per-channel moments of a layer's inputs: root mean square, mean magnitude and mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corank.statistics.precision import accumulation
from corank.statistics.statistic import Statistic
from corank.statistics.tokens import blocks, real_tokens


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of each input channel over T tokens.

    Attributes:
        rms: float64 [n], sqrt(E[x^2]) (CURing, Wanda).
        abs_mean: float64 [n], E[|x|] (ASVD).
        mean: float64 [n], E[x] (FLAP).
        count: T.
    """

    rms: Tensor
    abs_mean: Tensor
    mean: Tensor
    count: int


class InputMoments(Statistic):
    """Streams `Moments`; three vectors per layer where `InputGram` keeps a matrix.

    Args:
        n: input features.
        device: where the sums live. None: where the first batch lives.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    axes: ClassVar[dict[str, tuple[str, ...]]] = {"sum_x2": ("n",), "sum_abs": ("n",), "sum_x": ("n",)}

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
                self._add("sum_x2", block.double().square().sum(0))  # so that a constant channel has no variance
                self._add("sum_abs", block.abs().sum(0, dtype=torch.float64))
                self._add("sum_x", block.sum(0, dtype=torch.float64))
            self.count += len(rows)

    def result(self) -> Moments:
        """Raises CorankError if no token was seen."""
        return Moments(self._mean("sum_x2").sqrt(), self._mean("sum_abs"), self._mean("sum_x"), self.count)
