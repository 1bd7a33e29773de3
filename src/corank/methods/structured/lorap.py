"""LoRAP: attention by low rank, feed-forward networks by channels (Li et al., ICML 2024, arXiv:2404.09695).

    attention   W ~ B A, the best of rank k for || (W - B A) diag(E[x_j^2])^{1/2} ||_F;  v and o get alpha times the
                parameters of q and k; a pair that would not become smaller stays dense, and the other gets what is left
    channels    S_j = || |W_up,j| sqrt(E[x^2]) || + || |W_gate,j| sqrt(E[x^2]) || + || |W_down,j| sqrt(E[z_j^2]) ||;  the lowest
                go, but for the lowest hundredth, which is spared;  W_down' = W_down,J

Needs: mean squares of the inputs of all matrices of a block, behind the blocks that are compressed already. Stores: factor
pairs in attention, narrower matrices of one width in all blocks beside them; with attention=false narrower matrices
alone, an ordinary checkpoint. Attention and feed-forward networks keep the same share. Differs from the reference code: ranks from
k (m + n), so that grouped heads and other shapes are counted right; no inverse of the weights; what rounding ranks down
leaves goes to the channels. `corank heal` trains it afterwards.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("lorap", family="structured", cite="arXiv:2404.09695")
def lorap(alpha: float = 3.0, attention: bool = True) -> Structured:
    """Low-rank attention, spent on values and outputs; channels with small weighted rows and columns go.

    Args:
        alpha: parameters of values and outputs over those of queries and keys.
        attention: False: channels alone, attention keeps its size.
    """
    split = alpha if attention else None
    return Structured(units=("channels",), score="lorap", sequential=True, split=split, statistics=("moments",))
