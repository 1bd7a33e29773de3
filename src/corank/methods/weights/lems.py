"""LEMS: the two-sided truncation of KFAC-SVD, ranks by the divergence measured for every matrix alone (ICML 2026).

    min || R^{1/2} (W - W') G^{1/2} ||_F^2;   KL_l(k) = KL(dense || layer l truncated to rank k);
    min over ranks of sum_l KL_l(k_l)  with the budget,  KL_l through two measured points of every curve.

Needs: one forward and one backward pass, and two evaluations per matrix on held-out windows, each from the changed block
onwards. Stores: a factor pair; layers that gain nothing stay dense. Differs from the reference code: two measured points
in place of one, at 10% and 60% of the useful ranks, so that the exponent is measured too; no weight by depth; exact lower
hulls in place of an integer program; all positions of the text count in place of those after the first 256.
"""

from __future__ import annotations

from corank.factorize import Spectral, two_sided
from corank.recipe import Recipe, register


@register("lems", family="weights", cite="ICML 2026, github.com/lems-svd/lems")
def lems(shrink_inputs: float = 0.1, shrink_outputs: float = 0.3, precision: str = "auto") -> Recipe:
    """The least measured divergence of the predictions, over all layers at once.

    Args:
        shrink_inputs: weight of the identity in G.
        shrink_outputs: weight of the identity in R.
        precision: "auto", "double" or "mixed".
    """

    return Recipe(
        statistics=("gram", "clipped-gradient"),
        geometry=two_sided(shrink_inputs, shrink_outputs, "clipped-gradient"),
        factorize=Spectral(precision),
        allocate="lems",
        currency="energy",
    )
