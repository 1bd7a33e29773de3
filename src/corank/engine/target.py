"""What the factors of a site are to reproduce, and on which inputs: the dense ones or those the compressed model produces.

With dense inputs x, inputs x^ that the layer will really see and a mix t, the wanted output is t W x + (1 - t) W x^: t = 1
anchors to the dense model, t = 0 follows the shifted inputs (AA-SVD, SAES-SVD, MPIFA). All of them are one truncation of W~
under the metrics R of the outputs and H = E[x^ x^^T] of the inputs (`corank.linalg.retarget`), exact for every R.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corank.factorize import Geometry, Metric
from corank.linalg import retarget
from corank.recipe import Recipe
from corank.statistics import Cross, Gram

MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Mixes that an adaptive target tries."""


@dataclass(frozen=True, eq=False)
class Aim:
    """What a site's factors are made for.

    Attributes:
        start: [m, n], what is factorized.
        geometry: in which it is.
        goal: [m, n], what refits aim at; `start` unless the factorization is of the dense model's inputs.
        final: the geometry of the goal.
        mean_output: [m], wanted mean of the output without its bias, None unless the bias absorbs the mean.
        mix: t, None unless it was chosen for this site.
    """

    start: Tensor
    geometry: Geometry
    goal: Tensor
    final: Geometry
    mean_output: Tensor | None = None
    mix: float | None = None


def aim_of(
    recipe: Recipe,
    W: Tensor,
    geometry: Geometry,
    *,
    drifted: Gram | None = None,
    cross: Cross | None = None,
    share: Callable[[Tensor, Geometry], float] | None = None,
) -> Aim:
    """The aim of a recipe for one site.

    The damping of W~ towards W and that of H are one and the same, `recipe.ridge` or, where the recipe's geometry shrinks
    H, its shrinkage: the optimum is that of E|| L (t - W' x^) ||^2 + rho || L (W - W') ||_F^2, and nothing is solved for
    twice.

    Args:
        recipe: whose target, mix, ridge and start count.
        W: [m, n], float32 or float64.
        geometry: the recipe's, from what it measured: dense inputs or drifted ones.
        drifted: second moment of the drifted inputs, if the recipe refits.
        cross: joint moments of both, if the dense outputs are part of the target.
        share: (W~, its geometry) -> share of the energy that its truncation keeps; what an adaptive target goes by.
    """
    if cross is None and drifted is None:
        mean = None if geometry.mean is None else W.double() @ geometry.mean
        return Aim(W, geometry, W, geometry, mean)
    seen = drifted if cross is None else Gram(cross.H, cross.drifted_mean, cross.count)
    assert seen is not None
    of_gram = geometry.right.shrink is not None
    shrink = geometry.right.shrink or 0.0
    if cross is not None and shrink == 0.0:
        shrink = recipe.ridge / (1 + recipe.ridge)
    about = seen.centred() if recipe.affine else seen
    right = Metric((about.shrink(shrink) if shrink else about).G, shrink)
    final = dataclasses.replace(geometry, right=right, mean=seen.mean if recipe.affine else None)
    on_drifted = recipe.drifted and of_gram
    goal, mix, chosen = W, 0.0, None
    if cross is not None and shrink < 1.0:
        where = final if of_gram or recipe.start == "dense" else geometry
        C = cross.C - torch.outer(cross.mean, cross.drifted_mean) if recipe.affine else cross.C

        def moved(t: float) -> Tensor:
            return retarget(W.double(), C, about.G, t, shrink / (1 - shrink)).to(W.dtype)

        if recipe.target == "adaptive":
            assert share is not None
            mix = chosen = max(MIXES, key=lambda t: share(moved(t), where))
        else:
            mix = recipe.mix if recipe.target == "mixed" else 1.0
        goal = moved(mix)
    mean = None
    if recipe.affine:
        mean = W.double() @ (seen.mean if cross is None else mix * cross.mean + (1 - mix) * cross.drifted_mean)
    if recipe.refits:
        first = final if on_drifted else geometry
        return Aim(W if recipe.start == "dense" else goal, first, goal, final, mean, chosen)
    own = final if on_drifted else dataclasses.replace(geometry, mean=final.mean)
    return Aim(goal, own, goal, own, mean, chosen)
