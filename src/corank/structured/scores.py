"""How much a unit matters: the higher its score, the longer it stays.

With W [m, n] the consumer, W_j its columns, z the hidden vector, C = E[z z^T]; a unit of several columns sums over them:

    magnitude   ||W_j||^2
    wanda       mean_i |W_ij| sqrt(C_jj)                    (Wanda-sp, arXiv:2306.11695, arXiv:2312.11983)
    wifv        var(z_j) ||W_j||^2                          (FLAP, arXiv:2312.11983)
    leverage    [C (C + rho I)^-1]_jj                       (MoDeGPT, arXiv:2408.09632)
    obs         tr(W_G ([C^-1]_GG)^-1 W_G^T), exact for a unit of columns G
    greedy      the same, recomputed after every removal    (SlimGPT, arXiv:2412.18110)
    taylor      sum of |w dL/dw| over all weights of a unit (LLM-Pruner, arXiv:2305.11627)
    lorap       || |W_j| sqrt(C_jj) || of the consumer, and of the rows of the producers with their inputs; the lowest
                hundredth is spared                         (LoRAP, arXiv:2404.09695)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corank.errors import CorankError, unknown
from corank.linalg.least_squares import greedy_removal, removal_losses, ridge_leverage
from corank.structured.moments import Moments

DAMPING = 1e-8
"""Relative ridge that changes nothing but makes an inverse exist."""


@dataclass(frozen=True, eq=False)
class Given:
    """What is known of the units of one hidden vector.

    Attributes:
        W: consumer [m, n], float64.
        moments: of the vector; None for scores that need none.
        size: columns of a unit, which are neighbours.
        producers: matrices [n, d], rows in the order of the columns of W (for heads: those of values).
        inputs: moments of what the producers read.
        ridge: relative, of leverage scores; of the others too where there were fewer tokens than channels.
        sensitivity: sums of |w dL/dw| over all weights of each unit [n / size], for "taylor".
    """

    W: Tensor
    moments: Moments | None
    size: int = 1
    producers: Sequence[Tensor] = field(default_factory=tuple)
    inputs: Moments | None = None
    ridge: float = 1e-4
    sensitivity: Tensor | None = None

    @property
    def z(self) -> Moments:
        """The moments, which have to be there."""
        if self.moments is None:
            raise CorankError("This score needs calibration data.")
        return self.moments

    @property
    def damping(self) -> float:
        """Relative ridge under which an inverse of C is taken."""
        return max(self.ridge, DAMPING) if self.z.count < len(self.z.mean) else DAMPING

    @property
    def C(self) -> Tensor:
        """The whole second moment, which has to be there."""
        assert self.z.full, "measured as channels alone"
        return self.z.second


def _magnitude(given: Given) -> Tensor:
    return given.W.square().sum(0)


def _wanda(given: Given) -> Tensor:
    return given.W.abs().mean(0) * given.z.energy.sqrt()


def _wifv(given: Given) -> Tensor:
    return given.z.variance * given.W.square().sum(0)


def _leverage(given: Given) -> Tensor:
    return ridge_leverage(given.C, given.ridge)


def _obs(given: Given) -> Tensor:
    return removal_losses(given.W, given.C, given.size, given.damping)


def _lorap(given: Given) -> Tensor:
    score = given.W.square().sum(0).sqrt() * given.z.energy.sqrt()
    if given.inputs is not None:
        energy = given.inputs.energy
        for P in given.producers:
            score = score + (P.double().square() @ energy).sqrt()
    spared = score.argsort()[: len(score) // 100]
    score[spared] = torch.inf
    return score


def _taylor(given: Given) -> Tensor:
    if given.sensitivity is None:
        raise CorankError("This score needs gradients of the loss.")
    return given.sensitivity


SCORES: dict[str, Callable[[Given], Tensor]] = {
    "magnitude": _magnitude,
    "wanda": _wanda,
    "wifv": _wifv,
    "leverage": _leverage,
    "obs": _obs,
    "greedy": _obs,
    "lorap": _lorap,
    "taylor": _taylor,
}
"""Name -> scores of columns [n] or, where the score is one of whole units, [n / size]."""


def scores(name: str, given: Given, standardised: bool = False) -> Tensor:
    """Scores of the units of one vector.

    Args:
        name: one of `SCORES`.
        given: what is known.
        standardised: make them comparable between vectors: (score - mean) / std over the columns, averaged over each unit.

    Returns:
        float64 [n / size].
    """
    if name not in SCORES:
        raise unknown("score", name, SCORES)
    score = SCORES[name](given).double()
    if standardised:
        spread = score.std(correction=0) if len(score) > 1 else score.new_zeros(())
        score = (score - score.mean()) / spread if float(spread) > 0 else torch.zeros_like(score)
    units = given.W.shape[1] // given.size
    if len(score) == units:
        return score
    per_unit = score.view(units, given.size)
    return per_unit.mean(1) if standardised else per_unit.sum(1)


def choose(name: str, given: Given, keep: int) -> Tensor:
    """The units that stay, ascending: int64 [keep]."""
    if name == "greedy":
        return greedy_removal(given.W, given.C, keep, given.size, given.damping)
    return scores(name, given).topk(keep).indices.sort().values
