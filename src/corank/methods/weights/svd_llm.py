"""SVD-LLM: truncation-aware data whitening (Wang et al., ICLR 2025, arXiv:2403.07378).

    G = E[x x^T];  min || (W - W') X ||_F over rank(W') <= k  =>  W' = U_k U_k^T W,  U_k leading eigenvectors of W G W^T.

Needs: the Gram matrix of the inputs. Stores: a factor pair. Differs from the reference code: no Cholesky and no inverse,
so that singular statistics are a normal case, and the same optimum; directions that calibration never saw are projected
by U_k as well in place of being sent to zero. `update` refits B on the inputs that the compressed model produces, from
all calibration samples in place of 16.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("svd-llm", family="weights", cite="arXiv:2403.07378")
def svd_llm(update: bool = False, precision: str = "auto") -> Recipe:
    """The best rank-k layer on the calibration data.

    Args:
        update: refit B by least squares on the inputs of the partly compressed model (the paper's mode for keep < 0.7).
        precision: "auto", "double" or "mixed".
    """
    return Recipe(statistics=("gram",), geometry=whitened, factorize=Spectral(precision), refit=update)
