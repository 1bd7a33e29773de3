"""Plain truncated SVD (Eckart and Young 1936), the baseline that knows no data.

    min || W - W' ||_F over rank(W') <= k  =>  W' = U_k U_k^T W,  U_k the leading left singular vectors of W.

Needs: nothing. Stores: A = U_k^T W [k, n] and B = U_k [m, k].
"""

from __future__ import annotations

from corank.factorize import Spectral
from corank.recipe import Recipe, register


@register("svd", family="weights", cite="Eckart & Young 1936")
def svd(precision: str = "auto") -> Recipe:
    """Truncated SVD of the weight alone.

    Args:
        precision: "double", "mixed" (float32, repaired in float64 where needed), or "auto" (mixed, unless the weights are float64).
    """
    return Recipe(factorize=Spectral(precision))
