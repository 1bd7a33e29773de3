"""ZS-SVD: zero-sum truncation (ICML 2026, arXiv:2602.02848).

    W = sum_i P_i,  P_i = u_i u_i^T W,  u_i the eigenvectors of W G W^T;  removing component i changes the loss by
    dL_i = -<dL/dW, P_i> to first order;  remove those of the smallest |dL_i|, with signs that keep the sum near zero.

Needs: the Gram matrix of the inputs and one backward pass, for the mean gradient of every weight. Stores: a factor pair.
Differs from the reference code: the gradient is the mean over all calibration text in place of one sequence, whose noise
would decide; no inverse of the whitening; the rounds that correct the weights along the gradient afterwards are left out.
The paper's floor for strong compression is floor=0.3.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("zs-svd", family="weights", cite="arXiv:2602.02848")
def zs_svd(precision: str = "auto") -> Recipe:
    """Components whose first-order effects on the loss cancel are removed.

    Args:
        precision: "auto", "double" or "mixed".
    """
    return Recipe(
        statistics=("gram", "gradient-mean"), geometry=whitened, factorize=Spectral(precision), allocate="zs-svd"
    )
