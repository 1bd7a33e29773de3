"""NSVD: nested activation-aware decomposition (2025, arXiv:2503.17101).

    k = k1 + k2;  W1 = the truncation of W to k1 under G = E[x x^T];  W2 = the plain truncation of W - W1 to k2;  W' = W1 + W2.

Needs: the Gram matrix of the inputs. Stores: a factor pair of rank k. The second stage fits the weight itself, as an insurance
against calibration text that is not like the text to come: on the calibration data the result is a little worse than
`svd-llm`, which it is for share=1. Differs from the paper: no Cholesky.
"""

from __future__ import annotations

from corank.factorize import TwoStage, whitened
from corank.recipe import Recipe, register


@register("nsvd", family="weights", cite="arXiv:2503.17101")
def nsvd(share: float = 0.95, precision: str = "auto") -> Recipe:
    """Most of the rank for the calibration data, the rest for what is left of the weight.

    Args:
        share: k1 / k.
        precision: "auto", "double" or "mixed".
    """
    return Recipe(statistics=("gram",), geometry=whitened, factorize=TwoStage(share, "plain", precision))
