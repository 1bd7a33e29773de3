"""FLAP: units that fluctuate little are replaced by their mean (An et al., AAAI 2024, arXiv:2312.11983).

    S_j = var(z_j) ||W_j||^2;  units of all blocks in one list by (S - mean) / std, the lowest go until the budget is met;
    W' = W_J,  b' = b + W_J' E[z_J']

Needs: mean and variance of the inputs of the output and down projections. Stores: narrower matrices and two biases per block.
Differs from the reference code: the variance is that of all tokens (there the running mean is updated before it is used,
and the first sample is lost); a unit of attention is a key-value head with the query heads that read it, at its true
cost; scores of attention are not squared once more; every block keeps a head. `compensate=affine-ls` is the same form
with the best W', and never loses more on calibration data.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("flap", family="structured", cite="arXiv:2312.11983")
def flap(attention: bool = True) -> Structured:
    """Heads and channels whose contribution is nearly constant go; biases carry the constant.

    Args:
        attention: take heads out too.
    """
    return Structured(
        units=("channels", "heads") if attention else ("channels",),
        score="wifv",
        compensate="bias",
        allocate="z-score",
        statistics=("moments",),
    )
