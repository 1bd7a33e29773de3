"""MPIFA: pivoting factorization with reconstruction (Zhao et al., ICML 2025, arXiv:2501.19090).

    B, A = truncation of W under G = E[x x^T];  T = t W x + (1 - t) W x^, t = 0.25;  in turn
    B = E[T x^^T] A^T (A H A^T)^-1,   A = B^+ (E[T x^^T] + rho W)(H + rho I)^-1;   stored as k rows and m - k combinations.

Needs: the Gram matrix of the dense inputs, and both streams, group after group (q,k,v - o - gate,up - down). Stores: the
pivoted form, k (m + n - k) + k values, so that a budget buys more rank. Differs from the reference code: rho is relative to
H and in the objective of both updates, so that no update makes it larger; ranks are rounded down to the multiple, never
past the budget. Its "reconstruct_step 2" is one update of each factor; its ratios per layer are an allocator here.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("mpifa", family="weights", cite="arXiv:2501.19090")
def mpifa(multiple: int = 16, precision: str = "auto") -> Recipe:
    """Pivoted storage of factors that were refitted to the dense outputs.

    Args:
        multiple: ranks are multiples of this.
        precision: "auto", "double" or "mixed".
    """
    return Recipe(
        statistics=("gram",),
        geometry=whitened,
        factorize=Spectral(precision),
        target="mixed",
        mix=0.25,
        start="dense",
        alternations=2,
        pack=True,
        multiple_of=multiple,
    )
