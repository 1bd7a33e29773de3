"""First-order pruning: while a model is fine-tuned, weights that move towards zero are taken out (arXiv:2005.07683).

    S_ij = - sum_t w_ij dLoss/dw'_ij,   w' = mask * w;   at step t the v(t) of each matrix with the largest S stay,
    v falling from 1 to `keep` by a cubic

The gradient with respect to w' is there for masked weights too, so that a weight can come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from corank.errors import CorankError, unknown
from corank.factors import is_conv1d


def share_kept(step: int, steps: int, keep: float, begin: float = 0.1, settle: float = 0.3) -> float:
    """v(t): 1 until `begin` of the steps are done, `keep` in the last `settle` of them, a cubic in between.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, with a warm-up and a cool-down as in movement pruning.
    """
    first, last = begin * steps, (1 - settle) * steps
    left = 1.0 if step <= first else 0.0 if step >= last else 1 - (step - first) / (last - first)
    return keep + (1 - keep) * left**3


def top_mask(scores: Tensor, keep: float) -> Tensor:
    """Where the round(keep * numel) largest scores are; of equal ones the first."""
    count = round(keep * scores.numel())
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view_as(scores)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(W, mask)
        ctx.scores = scores
        return W * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        W, mask = ctx.saved_tensors
        ctx.scores.sub_((W * gradient).to(ctx.scores.dtype))
        return gradient * mask, None, None


class MovementMask(nn.Module):
    """w' = mask * w, which adds -w dLoss/dw' to the scores at every backward pass.

    Attributes:
        mask: bool, like the weight.
        scores: S, float32 or more.
    """

    mask: Tensor
    scores: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("scores", torch.zeros_like(weight, dtype=wide))

    def forward(self, W: Tensor) -> Tensor:
        """The masked weight."""
        return _Masked.apply(W, self.mask, self.scores)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Pruned:
    """A matrix after pruning.

    Attributes:
        W: [out, in], zeros where the mask is.
        mask: bool [out, in].
        scores: [out, in].
    """

    W: Tensor
    mask: Tensor
    scores: Tensor


BY = ("first-order", "magnitude")
"""What weights are ranked by: the scores S, or |w|."""


class MovementPruning:
    """Prunes linear layers of a model while something else trains it.

    Args:
        model: its layers compute with masked weights from now on.
        names: of linear layers.
        keep: share of the weights of each that is left at the end.
        steps: of training.
        begin, settle: see `share_kept`.
        by: one of `BY`.

    Raises:
        CorankError: a share out of range, no steps, or nothing known to rank weights by.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        keep: float,
        steps: int,
        begin: float = 0.1,
        settle: float = 0.3,
        by: str = "first-order",
    ) -> None:
        if by not in BY:
            raise unknown("way to choose weights", by, BY)
        if not 0 < keep <= 1:
            raise CorankError(f"keep={keep} should be a share of the weights, more than 0 and at most 1.")
        if steps < 1 or not (0 <= begin and 0 <= settle and begin + settle <= 1):
            raise CorankError("Pruning needs at least one step, and begin and settle that sum to at most 1.")
        self.model, self.names, self.keep, self.steps = model, list(names), keep, steps
        self.begin, self.settle, self.by = begin, settle, by
        self._masks: dict[str, MovementMask] = {}
        for name in self.names:
            layer: Any = model.get_submodule(name)
            self._masks[name] = MovementMask(layer.weight.detach())
            parametrize.register_parametrization(layer, "weight", self._masks[name])

    def step(self, done: int) -> float:
        """Set the masks after `done` steps of training; returns the share that is kept."""
        share = share_kept(done, self.steps, self.keep, self.begin, self.settle)
        for name, mask in self._masks.items():
            layer: Any = self.model.get_submodule(name)
            scores = mask.scores if self.by == "first-order" else layer.parametrizations.weight.original.detach().abs()
            mask.mask.copy_(top_mask(scores, share))
        return share

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Masks and scores, to go on from."""
        return {name: {"mask": each.mask, "scores": each.scores} for name, each in self._masks.items()}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `state`."""
        for name, each in self._masks.items():
            each.mask.copy_(state[name]["mask"])
            each.scores.copy_(state[name]["scores"])

    def finish(self) -> dict[str, Pruned]:
        """Leave the masked weights in the layers, as plain parameters; returns them with masks and scores."""
        found = {}
        for name in self.names:
            layer: Any = self.model.get_submodule(name)
            mask, scores = self._masks[name].mask, self._masks[name].scores
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            turned = [t.mT if is_conv1d(layer) else t for t in (layer.weight.detach(), mask, scores)]
            found[name] = Pruned(turned[0].clone(), turned[1], turned[2])
        return found
