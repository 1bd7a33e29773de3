"""KFAC-SVD: truncation in the Kronecker-factored curvature of the loss (LEMS, ICML 2026, github.com/lems-svd/lems).

    G = E[x x^T], R = E[g g^T] with g = dLoss/dy;  min || R^{1/2} (W - W') G^{1/2} ||_F over rank(W') <= k

Needs: one forward and one backward pass. Stores: a factor pair. The objective is the second-order change of the loss, so
that what different layers lose is in one currency. Differs from the reference code: no inverse roots; gradient norms are
clipped against the mean of their own sequence, so that the result does not depend on batching.
"""

from __future__ import annotations

from corank.factorize import Spectral, two_sided
from corank.recipe import Recipe, register


@register("kfac-svd", family="weights", cite="ICML 2026, github.com/lems-svd/lems")
def kfac_svd(
    shrink_inputs: float = 0.1, shrink_outputs: float = 0.3, clip: bool = True, precision: str = "auto"
) -> Recipe:
    """Two-sided SVD: the least predicted increase of the language-model loss.

    Args:
        shrink_inputs: weight of the identity in G.
        shrink_outputs: weight of the identity in R.
        clip: leave out the ends of each sequence and clip the gradient norms of tokens.
        precision: "auto", "double" or "mixed".
    """
    gradient = "clipped-gradient" if clip else "gradient"

    return Recipe(
        statistics=("gram", gradient),
        geometry=two_sided(shrink_inputs, shrink_outputs, gradient),
        factorize=Spectral(precision),
        currency="energy",
    )
