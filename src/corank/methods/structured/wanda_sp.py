"""Wanda-sp: structured pruning by weights times activations (An et al., arXiv:2312.11983, after Wanda, arXiv:2306.11695).

    S_j = mean_i |W_ij| sqrt(E[z_j^2]), summed over the columns of a head;  the lowest of each block go,  W' = W_J

Needs: mean squares of the inputs of the output and down projections, of each block behind those that are narrowed
already. Stores: narrower matrices, of the same widths in all blocks. Differs from the reference code: whole key-value
heads; feed-forward networks are measured behind the attention that has been narrowed.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("wanda-sp", family="structured", cite="arXiv:2306.11695")
def wanda_sp(attention: bool = True) -> Structured:
    """The smallest products of weight and activation go, nothing takes their place.

    Args:
        attention: take heads out too.
    """
    return Structured(
        units=("channels", "heads") if attention else ("channels",),
        score="wanda",
        sequential=True,
        statistics=("moments",),
    )
