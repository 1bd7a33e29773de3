"""SP3: masks on principal components, heads and channels (Hu et al., ACL Findings 2024, arXiv:2308.16475).

    Q = eigenvectors of E[x x^T], x what all norms see;  embeddings E Q, consumers W diag(gamma) Q, producers Q^T W
    min over log_alpha, max over l1, l2:   KL( dense || z ) + l1 (s - t) + l2 (s - t)^2,   z hard concrete gates on
    components, heads and channels, s the share of parameters that is expected to go, t rising to the budget

    at the end gates of survivors go into the weights, and the rest is sliced off

Needs: second moments of the residual stream, the dense model's predictions, `steps` forward and backward passes with the
model in memory. Stores: narrower matrices and a smaller hidden size, in one model of the same family; a head that was the
embedding becomes a matrix of its own. Differs from the paper, which has no code: one basis and one number of components for all
places, so that no maps between bases are stored and the result is an ordinary model; adapters (rank=0 by default)
may train beside the gates, which begin in the order of what they change to first order.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.l0 import L0
from corank.structured.recipe import LEARNED, Structured


@register("sp3", family="structured", cite="arXiv:2308.16475")
def sp3(
    attention: bool = True,
    steps: int = 40,
    minutes: float | None = None,
    rank: int = 0,
    rate: float = 1e-4,
    prior: str = "first-order",
) -> Structured:
    """Principal components of the residual stream, heads and channels learn to go, taught by the dense model.

    Args:
        attention: take heads out too.
        steps: of training, of two windows each.
        minutes: an earlier end by the clock.
        rank: of adapters on queries and values; 0: none.
        rate: their learning rate.
        prior: order in which gates begin, "first-order" or "none".
    """
    return Structured(
        units=("channels", "heads") if attention else ("channels",),
        score=LEARNED,
        learn=L0(steps, minutes, rank, rate=rate, principal=True, distil=True, prior=prior),
    )
