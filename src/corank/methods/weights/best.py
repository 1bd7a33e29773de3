"""corank's own recipe: the combination of published ideas that loses least for every byte (docs/how-it-works.md).

    min sum over layers of || R^{1/2} (W - W') G^{1/2} ||_F^2   subject to   sum over layers of cost(rank) <= budget

with G = E[x x^T], R = E[g g^T], g = dLoss/dy, both lightly shrunk; cost(k) = k (m + n - k) + k, that of pivoted storage.

Needs: one forward and one backward pass. Stores: pivoted pairs; layers that gain nothing stay dense. From KFAC-SVD the
metric; one exact allocation of the whole budget over all layers, which the metric makes comparable (the objective is
the second-order change of the loss); from PIFA the storage, whose cost the allocation knows. Where no gradients can be
had it falls back, with a warning, to G alone and uniform ranks.

A block may also lose channels and heads, in the same objective: W' = V S_J with V = W G[:, J] G_JJ^+ for the
matrix that reads them, and fewer rows for those that make them (MoDeGPT, arXiv:2408.09632, in both metrics).
"""

from __future__ import annotations

from corank.errors import unknown
from corank.factorize import Spectral, two_sided, whitened
from corank.recipe import Recipe, register

EFFORTS = {"fast": 0, "balanced": 1, "max": 4}
"""Passes of distillation over the calibration text after the closed form."""


@register("best", family="weights", cite="corank")
def best(
    effort: str = "fast",
    shrink_inputs: float = 0.005,
    shrink_outputs: float = 0.03,
    precision: str = "auto",
    families: str = "auto",
) -> Recipe:
    """The least predicted increase of the loss, over all layers at once.

    Args:
        effort: "fast", the closed form alone; "balanced" and "max", followed by one or four passes of distillation.
        shrink_inputs: weight of the identity in G.
        shrink_outputs: weight of the identity in R.
        precision: "auto", "double" or "mixed".
        families: "factorize" matrices, "narrow" the channels and heads between them, or "both" by the same objective; "auto":
            both, unless another setting stands against it.
    """

    if effort not in EFFORTS:
        raise unknown("effort", effort, EFFORTS)
    heal = "kd" if EFFORTS[effort] else "none"
    inputs_alone = Recipe(
        statistics=("gram",),
        geometry=whitened,
        factorize=Spectral(precision),
        pack=True,
    )
    return Recipe(
        statistics=("gram", "gradient"),
        geometry=two_sided(shrink_inputs, shrink_outputs),
        factorize=Spectral(precision),
        allocate="lagrange",
        currency="energy",
        pack=True,
        heal=heal,
        epochs=float(EFFORTS[effort] or 2),
        families=families,
        fallback=inputs_alone,
    )
