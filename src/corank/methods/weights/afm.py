"""AFM: atomic feature mimicking (Yu et al., KDD 2024, arXiv:2405.18146, and AAAI 2023 for language models).

    y = W x + b;  C = E[y y^T] - E[y] E[y]^T;  U = its top-k eigenvectors;  y' = U (U^T W x + U^T b) + (I - U U^T) E[y].

Needs: Gram matrix and mean of the inputs (C = W G_c W^T; no outputs are stored). Stores: a factor pair and a bias. The same
estimator as `lord`. Of an embedding E [V, d] it is the principal components of the vectors as they are looked up,
E' = E U, U of E^T diag(p) E with p the smoothed frequency of every token, which needs counts only: select it with
targets=embed and set affine=false, because an embedding has no bias for the mean (one more rank holds it at least as well).
Differs from the reference code, which does not run as published: exact eigenvectors, no nonlinearity between the factors.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("afm", family="weights", cite="arXiv:2405.18146")
def afm(precision: str = "auto") -> Recipe:
    """Principal components of what a layer, or an embedding, puts out.

    Args:
        precision: "auto", "double" or "mixed".
    """
    return Recipe(statistics=("gram",), geometry=whitened, factorize=Spectral(precision), affine=True)
