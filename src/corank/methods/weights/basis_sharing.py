"""Basis Sharing: neighbouring layers read one basis (Wang et al., ICLR 2025, arXiv:2410.03765).

    G = sum_l E[x_l x_l^T];  U_k: leading eigenvectors of W G W^T, W = [W_1; ...; W_g]  =>  A = U_k^T W,  W'_l = B_l A

for q, k, v, gate and up of g neighbouring layers; o and down keep factors of their own. Needs: the Gram matrix of the
inputs of every layer. Stores: the basis once, in the first layer of a group, and B_l in each: k (n + sum m_l) values. Differs
from the reference code: no Cholesky and no inverse; B_l is fitted to the inputs of its own layer (they differ from the
sum's), which is never worse for it; a fused q, k, v or gate and up counts as one matrix.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("basis-sharing", family="weights", cite="arXiv:2410.03765")
def basis_sharing(layers: int = 2, normalize: bool = False, update: bool = False, precision: str = "auto") -> Recipe:
    """One basis for the same matrix of neighbouring layers.

    Args:
        layers: neighbouring layers that share; 1 shares nothing and is svd-llm. With grouped-query attention k and v are
            small, and sharing them gains least.
        normalize: let every layer count by its relative loss; otherwise the one with the largest activations dominates.
        update: refit B_l by least squares on the inputs of the partly compressed model (the paper's mode for keep <= 0.6).
        precision: "auto", "double" or "mixed".
    """
    return Recipe(
        statistics=("gram",),
        geometry=whitened,
        factorize=Spectral(precision),
        currency="relative" if normalize else "energy",
        share="layers",
        group=layers,
        refit=update,
    )
