"""ARA: adaptive rank allocation by learned masks (arXiv:2510.19389).

    W'(theta) = sum_i mask_i(theta) u_i u_i^T W;  mask_i = chance of a rank of at least i under softmax(theta), or of
    staying dense;  min over theta of KL(dense || masked) + guidance  with the expected size at the budget.

Needs: the Gram matrix of the inputs; `steps` forward and backward passes over calibration text, for a few dozen logits per
matrix. Stores: a factor pair, or the dense matrix. Differs from the paper: divergence from the dense model in place of the
language-model loss; the budget is met exactly all along in place of a penalty; guidance is the spread of each mask's
ranks, which goes to zero; the last third of the steps rounds the masks on the way forward; the final ranks are one
quantile of all masks, that which uses the budget up.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("ara", family="weights", cite="arXiv:2510.19389")
def ara(precision: str = "auto") -> Recipe:
    """Ranks are learned as monotone masks over whitened components, staying dense included.

    Args:
        precision: "auto", "double" or "mixed".
    """
    return Recipe(statistics=("gram",), geometry=whitened, factorize=Spectral(precision), allocate="ara")
