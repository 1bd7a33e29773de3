"""What the consumer of a narrowed vector does about the units that are gone.

    none        W' = W_J
    bias        W' = W_J,  b' = b + W_J' mean_J'                             (FLAP, arXiv:2312.11983)
    ls          W' = W C[:, J] C_JJ^+                                        (MoDeGPT, SlimGPT)
    affine-ls   W' = W S[:, J] S_JJ^+,  b' = b + W mean - W' mean_J,  S = C - mean mean^T

Each of the last three is the best of its form for what was measured, so none <= bias <= affine-ls and none <= ls <= affine-ls
in what they preserve.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corank.errors import unknown
from corank.linalg.least_squares import affine_column_least_squares, column_least_squares, complement, selection_loss
from corank.statistics import Cross
from corank.structured.moments import Moments
from corank.structured.recipe import COMPENSATIONS

NOISE = 1e-7
"""Relative ridge of moments that were measured in less than float64: below it there is rounding alone."""


@dataclass(frozen=True, eq=False)
class Consumer:
    """The consumer of a narrowed vector.

    Attributes:
        weight: W' [m, k], float64.
        shift: what is added to the bias [m], None for nothing.
        loss: ``||Y - Y'|| / ||Y||`` of its output without bias on calibration data, None if that is not known.
    """

    weight: Tensor
    shift: Tensor | None
    loss: float | None


def ridge_for(moments: Moments, ridge: float, exact: bool) -> float:
    """The relative ridge of least squares: the recipe's if there were fewer tokens than channels, else next to none.

    Args:
        ridge: that of the recipe.
        exact: whether the moments were measured in float64.
    """
    if moments.count < len(moments.mean):
        return max(ridge, NOISE)
    return 0.0 if exact else NOISE


def compensate(
    how: str, W: Tensor, kept: Tensor, moments: Moments | None, ridge: float = 0.0, joint: Cross | None = None
) -> Consumer:
    """The consumer of the columns that stay.

    Args:
        how: "none", "bias", "ls" or "affine-ls".
        W: [m, n].
        kept: int64 [k], columns that stay.
        moments: of the vector that will really come; whole second moments for "ls" and "affine-ls"; None for "none".
        ridge: pull of least squares towards W_J, relative.
        joint: moments with the vector of the dense model, whose product with W is what "ls" and "affine-ls" aim at; None: the
            vector that comes is that of the dense model.
    """
    W, shift = W.double(), None
    if how == "none":
        weight = W[:, kept]
    elif how not in COMPENSATIONS:
        raise unknown("compensation", how, COMPENSATIONS)
    else:
        assert moments is not None, "compensation needs moments"
        C, mean = moments.second, moments.mean
        cross, target = (None, None) if joint is None else (joint.C, joint.mean)
        if how == "bias":
            gone = complement(kept, W.shape[1])
            weight, shift = W[:, kept], W[:, gone] @ mean[gone]
        elif how == "ls":
            weight = column_least_squares(W, C, kept, ridge=ridge, cross=cross)
        else:
            weight, shift = affine_column_least_squares(W, C, mean, kept, ridge=ridge, cross=cross, target_mean=target)
    return Consumer(weight, shift, _loss(W, kept, moments, weight, shift, joint))


def _loss(
    W: Tensor, kept: Tensor, moments: Moments | None, weight: Tensor, shift: Tensor | None, joint: Cross | None
) -> float | None:
    if moments is None or not moments.full:
        return None
    if joint is None:
        total = float(((W @ moments.second) * W).sum())
        lost = selection_loss(W, moments.second, kept, weight, shift, moments.mean)
    else:
        total = float(((W @ joint.G) * W).sum())
        aimed = W @ joint.C[:, kept]
        lost = total - float(((2 * aimed - weight @ joint.H[kept][:, kept]) * weight).sum())
        if shift is not None:
            lost += float(shift @ (shift - 2 * (W @ joint.mean - weight @ joint.drifted_mean[kept])))
    return (max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0
