"""IO-SVD: input and output metrics, the latter of the predictions among the top tokens (2026, arXiv:2605.15626).

    G = E[x x^T];  R = E[J^T (diag p - p p^T) J],  p the softmax of the K largest logits, J their derivative by y = W x;
    min || R^{1/2} (W - W') G^{1/2} ||_F over rank(W') <= k, half of which is the KL divergence of p to second order.

Needs: one forward and one backward pass. Stores: a factor pair. R is estimated from one label per token, drawn from p: the
gradient of its loss is J^T (p - e_c), whose second moment is R. Differs from the paper: its greedy choice of ranks goes by
first-order terms; here the curves of this metric, which add up to the predicted divergence, are spent exactly. Both metrics
are shrunk lightly. `kfac-svd` with labels=sampled is the same with all tokens in place of K. The paper's IO-SVD+ stores the
factors in 8 bits ("remapping", as Dobi-SVD does: 2 k max(m, n) bytes). That is quantization, whose measure is the dense
matrix in 8 bits; here it is a step of its own, `corank.checkpoint.quantize_factors`, which takes k (m + n) bytes and scales.
"""

from __future__ import annotations

from corank.factorize import Spectral, two_sided
from corank.recipe import Recipe, register


@register("io-svd", family="weights", cite="arXiv:2605.15626")
def io_svd(top: int = 5, shrink_inputs: float = 0.005, shrink_outputs: float = 0.03, precision: str = "auto") -> Recipe:
    """Two-sided SVD: the least predicted change among the tokens that the model prefers.

    Args:
        top: K, at least 2.
        shrink_inputs: weight of the identity in G.
        shrink_outputs: weight of the identity in R.
        precision: "auto", "double" or "mixed".
    """

    return Recipe(
        statistics=("gram", "gradient"),
        geometry=two_sided(shrink_inputs, shrink_outputs),
        factorize=Spectral(precision),
        allocate="lagrange",
        currency="energy",
        labels=f"top{top}",
    )
