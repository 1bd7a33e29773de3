"""Joint rank-k: matrices that read the same input are truncated together (Peng et al., 2024, arXiv:2402.16319).

    [W_1; W_2] = U Sigma V^T;  A = U_k^T [W_1; W_2],  [B_1; B_2] = U_k,  for (q, k) and (gate, up)

Needs: no data. Stores: one basis for both, k (n + m_1 + m_2) values; every other matrix has factors of its own. The authors
published no code; that the common factor is the one on the input side is our reading: there the pair has one input, and the
product with the basis is computed for both at once.
"""

from __future__ import annotations

from corank.factorize import Spectral
from corank.recipe import Recipe, register


@register("joint-rank-k", family="weights", cite="arXiv:2402.16319")
def joint_rank_k(values: bool = False, normalize: bool = False, precision: str = "auto") -> Recipe:
    """Truncated SVD of q and k together, and of gate and up.

    Args:
        values: let v share the basis of q and k.
        normalize: let both count by their relative loss; otherwise the larger one takes the basis.
        precision: "auto", "double" or "mixed".
    """
    return Recipe(
        factorize=Spectral(precision),
        currency="relative" if normalize else "energy",
        share="siblings" if values else "pairs",
    )
