"""LoRAP's half for feed-forward networks (Li et al., ICML 2024, arXiv:2404.09695).

    S_j = || |W_up,j| sqrt(E[x^2]) || + || |W_gate,j| sqrt(E[x^2]) || + || |W_down,j| sqrt(E[z_j^2]) ||;  the lowest go, but for
    the lowest hundredth, which is spared;  W' = W_J

Needs: mean squares of the inputs of the gate, up and down projections, of each block behind those that are narrowed
already. Stores: narrower matrices, of the same width in all blocks. The other half, low-rank attention by activation-weighted
decomposition, is what asvd does; here attention keeps its size.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("lorap", family="structured", cite="arXiv:2404.09695")
def lorap() -> Structured:
    """Channels with small weighted rows and columns go, except the very smallest."""
    return Structured(units=("channels",), score="lorap", sequential=True, statistics=("moments",))
