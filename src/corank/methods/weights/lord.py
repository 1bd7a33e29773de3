"""LoRD: low-rank decomposition of monolingual code models (Kaushal et al. 2023, arXiv:2309.14021).

    C_y = E[(y - mean y)(y - mean y)^T];  Q = its top-k eigenvectors;  B = Q, A = Q^T W;  b' = b + (W - W') mean x.

Needs: Gram matrix and mean of the inputs (C_y = W G_c W^T, no outputs are stored). Stores: a factor pair and a bias.
The same estimator as `svd-llm` on centred inputs.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("lord", family="weights", cite="arXiv:2309.14021")
def lord(precision: str = "auto") -> Recipe:
    """Principal components of each layer's output, the mean output going to the bias.

    Args:
        precision: "auto", "double" or "mixed".
    """
    return Recipe(statistics=("gram",), geometry=whitened, factorize=Spectral(precision), affine=True)
