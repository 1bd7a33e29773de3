"""Model folding: alike channels become one (Wang et al., ICLR 2025, arXiv:2502.10216).

    cluster the rows [W_gate, W_up, W_down^T]_j by Ward's criterion, M [k, n] the 0/1 membership;
    producers (M M^T)^-1 M W,  consumer W M^T
    convolutions: rows with their batch norms multiplied in, of all convolutions that make a feature map; readers W M^T

Needs: no data. Stores: narrower matrices, of the same width in all blocks, and convolutions with fewer channels. In transformers
channels of feed-forward networks only: the mean of query and key heads is not a head. In convolutional networks all feature maps but
those that anything else looks at (layer norms, concatenation, grouped convolutions); the mean of alike channels varies less than
they do, for which batch norms are repaired: from the weights, or measured on images. Differs from the reference code: in
float64; no rotation by principal components, which leaves distances as they are; every block or feature map loses the same
share; the repair from weights changes the variance in the norm in place of rescaling what comes out.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("fold", family="structured", cite="arXiv:2502.10216")
def fold(balance: bool = True, repair: str = "weights") -> Structured:
    """Clusters of alike channels are replaced by their means; needs no data.

    Args:
        balance: bring up and down projections of a gated network to the same norms first, channel by channel, which changes
            nothing but lets channels that are the same up to a factor be found.
        repair: of batch norms of convolutional networks: "weights", "data" (images, given as data=) or "none".
    """
    score = "balanced" if balance else "plain"
    return Structured(units=("channels",), score=score, compensate="cluster", repair=repair)
