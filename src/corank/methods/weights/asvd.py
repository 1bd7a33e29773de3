"""ASVD: activation-aware SVD (Yuan et al. 2023, arXiv:2312.05821).

    d_j = (mean |x_j|)^alpha;   min || (W - W') diag(d) ||_F  =>  truncated SVD of W diag(d), undone on the right.

Needs: mean magnitude of each input channel. Stores: a factor pair. Differs from the reference code: an exact SVD in
place of a randomized one without oversampling; a singular channel is a normal case (no 1/d is formed).
"""

from __future__ import annotations

from corank.factorize import Geometry, Measured, Spectral
from corank.recipe import Recipe, register


@register("asvd", family="weights", cite="arXiv:2312.05821")
def asvd(alpha: float = 0.5, precision: str = "auto") -> Recipe:
    """SVD weighted by the magnitude of each input channel.

    Args:
        alpha: exponent of the mean magnitude; 0 is plain SVD.
        precision: "auto", "double" or "mixed".
    """

    def geometry(measured: Measured) -> Geometry:
        d = measured.moments.abs_mean**alpha
        return Geometry(measured.diagonal(d.square()))

    return Recipe(statistics=("moments",), geometry=geometry, factorize=Spectral(precision))
