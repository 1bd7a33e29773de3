"""Dobi-SVD: truncation positions learned by gradient descent (Wang et al., ICLR 2025, arXiv:2502.02723).

    mask_i = 0.5 tanh(beta (gamma - i / p)) + 0.5,  one position gamma per matrix of full rank p;
    W'(gamma) = sum_i mask_i u_i u_i^T W;  min over all gamma of KL(dense || masked)  with the expected size at the budget.

Needs: the Gram matrix of the inputs; `steps` forward and backward passes over calibration text, for one number per matrix.
Stores: a factor pair. Differs from the reference code: the components are those of the whitened weight and stay fixed, so
that no decomposition is differentiated and training is a hundred times cheaper; the weights are the optimal truncation
in place of an incremental average of subspaces, which loses more; the budget is met exactly in place of a penalty; steps
grow from gentle to steep (beta from 10 to 100); no 8-bit remapping, which is quantization.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("dobi-svd", family="weights", cite="arXiv:2502.02723")
def dobi_svd(precision: str = "auto") -> Recipe:
    """Every matrix learns the position at which its components are cut off.

    Args:
        precision: "auto", "double" or "mixed".
    """
    return Recipe(statistics=("gram",), geometry=whitened, factorize=Spectral(precision), allocate="dobi-svd")
