"""AA-SVD: anchored and adaptive SVD (Sinha & Fleuret 2026, arXiv:2604.02119), its closed-form part.

    H = E[x^ x^^T], C = E[x x^^T];  T = t W x + (1 - t) W x^;  W~ = W ((1 - t) H + t C) H^-1;
    min E|| T - W' x^ ||^2 over rank(W') <= k  =>  W' = the truncation of W~ under H.

x are the inputs of a layer in the dense model, x^ those it sees behind the layers compressed so far. Groups are compressed in
the order q,k,v - o - gate,up - down, each measured anew. Needs: both Gram matrices, two activation streams. Stores: a
factor pair. Differs from the reference code: no Cholesky, no absolute jitter; a damping relative to H, which pulls to W
and belongs to the objective. The paper trains every block afterwards, which is where most of its gain comes from; this is
what it starts from.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("aa-svd", family="weights", cite="arXiv:2604.02119")
def aa_svd(anchor: float = 1.0, precision: str = "auto") -> Recipe:
    """The rank-k layer that is nearest to the dense layer's outputs, given the inputs it will really see.

    Args:
        anchor: t, how much of the target is the dense model's output; 0 follows the shifted inputs alone.
        precision: "auto", "double" or "mixed".
    """
    return Recipe(statistics=("gram",), geometry=whitened, factorize=Spectral(precision), target="mixed", mix=anchor)
