"""SAES-SVD: self-adaptive suppression of accumulated and local errors (Hu et al., ICLR 2026, arXiv:2602.03051).

    min || (W' - W) x^ ||^2 + a || W' x^ - W x ||^2  =>  with t = a / (1 + a): truncate W~ = W (H + t (C - H)) H^-1 under H;
    t of each layer: the one that maximises sum_{i<=k} sigma_i^2 / sum_i sigma_i^2 of W~ H^{1/2}.

Needs: as `aa-svd`, of which this is the choice of t per layer. Stores: a factor pair. Differs from the paper: t comes from
a grid of five values, one exact decomposition each. A large share of the energy is kept also by adding energy, so that this
t need not be the one with the least error; `aa-svd` is the same with t fixed.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("saes-svd", family="weights", cite="arXiv:2602.03051")
def saes_svd(mix: float | None = None, precision: str = "auto") -> Recipe:
    """Anchored SVD, each layer leaning on the dense outputs as far as its rank can follow.

    Args:
        mix: t, the same for all layers; None: chosen for each.
        precision: "auto", "double" or "mixed".
    """
    return Recipe(
        statistics=("gram",),
        geometry=whitened,
        factorize=Spectral(precision),
        target="adaptive" if mix is None else "mixed",
        mix=0.5 if mix is None else mix,
    )
