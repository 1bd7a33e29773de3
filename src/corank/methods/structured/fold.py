"""Model folding: alike channels become one (Wang et al., ICLR 2025, arXiv:2502.10216).

    cluster the rows [W_gate, W_up, W_down^T]_j by Ward's criterion, M [k, n] the 0/1 membership;
    producers (M M^T)^-1 M W,  consumer W M^T

Needs: no data. Stores: narrower matrices, of the same width in all blocks. Channels of feed-forward networks only: the mean
of query and key heads is not a head. Differs from the reference code: in float64; no rotation by principal components,
which leaves distances as they are; every block loses the same share.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("fold", family="structured", cite="arXiv:2502.10216")
def fold(balance: bool = True) -> Structured:
    """Clusters of alike channels are replaced by their means; needs no data.

    Args:
        balance: bring up and down projections of a gated network to the same norms first, channel by channel, which changes
            nothing but lets channels that are the same up to a factor be found.
    """
    return Structured(units=("channels",), score="balanced" if balance else "plain", compensate="cluster")
