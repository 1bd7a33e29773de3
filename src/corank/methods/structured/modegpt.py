"""MoDeGPT: pairs of matrices are narrowed together, module by module (Lin et al., ICLR 2025, arXiv:2408.09632).

    (gate/up, down)  keep the k channels with the largest ridge leverage [C (C + rho I)^-1]_jj,  C = E[z z^T];
                     W_down' = W_down C[:, J] C_JJ^+
    (Q, K)           keep the rotary pairs with the largest E[q^2] E[k^2], the same in all heads and blocks
    (V, O)           the best r dimensions of each key-value head for all query heads that read it: C_v = R R^T,
                     R^T (sum_a W_O,a^T W_O,a) R = Q S^2 Q^T;  W_V' = Q_r^T R^+ W_V,  W_O,a' = W_O,a R Q_r
    shares of the blocks  phi = softmax(-s / eps), s what a block changes, none above the cap

Needs: one forward pass for s, one for second moments of the inputs of q, k, v, of o and of down. Stores: narrower matrices.
Attention keeps its size as long as the feed-forward networks give up no more than half of their channels, which on models
with grouped queries is up to about 40% of all parameters: there are few parameters in it. Beyond that all heads of all
blocks get one smaller size, so that the result stays storable. Differs from the paper, which narrows all modules of a block
alike: the ridge is relative to the mean square; (V, O) looks at all query heads of a group together, and W_O' is fitted to
what it really reads, mixtures of values; eps is relative to the mean of s; the logits of attention stay divided by the root
of the original head size.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("modegpt", family="structured", cite="arXiv:2408.09632")
def modegpt(attention: bool = True, selector: str = "leverage") -> Structured:
    """Narrower modules in an ordinary architecture, each the best for its inputs.

    Args:
        attention: heads may lose dimensions at small budgets; False: channels alone.
        selector: score of channels; "greedy" is that of SlimGPT, which also looks at the down projection.
    """
    return Structured(
        units=("channels", "qk", "vo") if attention else ("channels",),
        score=selector,
        compensate="ls",
        allocate="entropic",
        statistics=("gram",),
    )
