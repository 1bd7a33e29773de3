"""LLM-Pruner: groups of weights that the loss is least sensitive to (Ma et al., NeurIPS 2023, arXiv:2305.11627).

    S_u = sum of |w dL/dw| over all weights of the group: rows of q, k, v and columns of o of a head, rows of gate, up and the
    column of down of a channel;  the lowest of each block go,  W' = W_J

Needs: one backward pass through the dense model. Stores: narrower matrices, of the same widths in all blocks. Differs from the
reference code: gradients of the mean loss over all calibration text in place of ten samples of 64 tokens; whole key-value
heads; all blocks are narrowed (there the first four and last two of 32 are not: protect=0,1,2,3,-2,-1). The fine-tuning that
belongs to it is `corank heal`.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("llm-pruner", family="structured", cite="arXiv:2305.11627")
def llm_pruner(attention: bool = True) -> Structured:
    """The groups with the least first-order effect on the loss go, nothing takes their place.

    Args:
        attention: take heads out too.
    """
    return Structured(
        units=("channels", "heads") if attention else ("channels",),
        score="taylor",
        statistics=("gradient-mean",),
    )
