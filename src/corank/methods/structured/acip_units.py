"""ACIP on channels and heads: one gradient descent, then any size in the native format (after arXiv:2502.01717).

    h_u <- z_u h_u,   z = 1[m > 0],  dz/dm as of relu(m)     on channels, and on key-value heads with their query heads
    min over m of KL(dense || gated) + lambda sum_u c_u relu(m_u),   lambda such that gates close from step to step
    score = m_u while z_u = 1;  0 when it becomes 0, and one less after every further step;  the lowest scores go

Needs: training text, `steps` forward and backward passes with the model in memory. Stores: narrower matrices, of the same widths
in all blocks with uniform=true, and in `any-size/` the score map, from which `corank prune` makes every smaller size in
seconds. Differs from the paper: units of hidden vectors in place of singular values, so that every one that goes saves
something and nothing new is needed to load the result; gates begin in the order of |dloss / dz_u| per parameter, which the first
fifth of the steps measures; no LoRA: heal a pruned model.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.any_units import AnyUnits
from corank.structured.recipe import LEARNED, Structured


@register("acip-units", family="structured", cite="arXiv:2502.01717")
def acip_units(
    attention: bool = True, steps: int = 64, minutes: float | None = None, to: float = 0.4, loss: str = "kd"
) -> Structured:
    """One training gives an order of all channels and heads, and every size follows from it.

    Args:
        attention: take heads out too.
        steps: of training, of two windows each.
        minutes: an earlier end by the clock.
        to: share of what channels and heads hold at which training ends.
        loss: "kd", divergence from the dense model, or "text", the loss on the text.
    """
    return Structured(
        units=("channels", "heads") if attention else ("channels",),
        score=LEARNED,
        learn=AnyUnits(steps, minutes, to, loss),
    )
