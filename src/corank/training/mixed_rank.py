"""Fine-tuning in which a layer is its full matrix or its factors by the toss of a coin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax

from corank.errors import CorankError
from corank.factors import LowRank, is_conv1d, replace


class MixedRankLinear(nn.Module):
    """y = W x + bias or y = B A x + bias, as `full` says; in evaluation always the factors. W does not train.

    Attributes:
        factors: the `LowRankLinear` that stays; it holds the bias.
        matrix: W [out, in].
        full: which of the two computes in training.
    """

    matrix: Tensor

    def __init__(self, W: Tensor, pair: LowRank, bias: Tensor | None, transposed: bool) -> None:
        super().__init__()
        self.factors = pair.module(bias)
        self.register_buffer("matrix", W)
        self.out_features, self.in_features = pair.shape
        self.transposed = transposed
        self.full = False

    @property
    def bias(self) -> Tensor | None:
        """[out] or None."""
        return self.factors.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        return linear(x, self.matrix, self.bias) if self.full and self.training else self.factors(x)


class MixedRank:
    """Lets each of some layers be full with probability p(t), which falls from 1 to 0, and factors otherwise.

    Args:
        model: its layers are replaced.
        parts: name -> (W [out, in], its factors).
        steps: of training.
        anneal: share of the steps over which p falls, linearly; 0: the factors from the first step.
        seed: of the coins.

    Raises:
        CorankError: anneal out of range, or no steps.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, tuple[Tensor, LowRank]],
        steps: int,
        anneal: float = 0.5,
        seed: int = 0,
    ) -> None:
        if steps < 1 or not 0 <= anneal <= 1:
            raise CorankError("Mixed-rank training needs at least one step, and anneal between 0 and 1.")
        self.model, self.steps, self.anneal = model, steps, anneal
        self._coins = torch.Generator().manual_seed(seed)
        self.layers: dict[str, MixedRankLinear] = {}
        for name, (W, pair) in parts.items():
            old: Any = model.get_submodule(name)
            layer = MixedRankLinear(W, pair, old.bias, is_conv1d(old)).train(old.training)
            model.set_submodule(name, layer)
            self.layers[name] = layer

    def probability(self, step: int) -> float:
        """p(t)."""
        return max(0.0, 1 - step / (self.anneal * self.steps)) if self.anneal else 0.0

    def draw(self, step: int) -> int:
        """Toss the coins for step `step` (from 0); returns how many layers are full."""
        tossed = torch.rand(len(self.layers), generator=self._coins) < self.probability(step)
        for layer, full in zip(self.layers.values(), tossed.tolist(), strict=True):
            layer.full = full
        return int(tossed.sum())

    def low(self) -> None:
        """Let all layers be their factors, until the next draw."""
        for layer in self.layers.values():
            layer.full = False

    def finish(self) -> None:
        """Leave the factors in place as ordinary factorized layers."""
        for name, layer in self.layers.items():
            replace(self.model, name, layer.factors)


def consistency(low: Tensor, mixed: Tensor) -> Tensor:
    """KL divergence of the predictions of the all-factor model from those of the mixed one, which is not trained by it.

    Args:
        low: logits [..., classes].
        mixed: logits of the same shape.

    Returns:
        the mean over all but the last axis.
    """
    target = log_softmax(mixed.detach(), -1)
    return kl_div(log_softmax(low, -1).flatten(0, -2), target.flatten(0, -2), log_target=True, reduction="batchmean")
