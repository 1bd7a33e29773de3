"""LoRAPrune: heads and channels go while adapters are tuned (Zhang et al., ACL Findings 2024, arXiv:2305.18403).

    each step:  I <- 0.9 I + 0.1 s,   s_u = |dloss / dg_u| of a gate g_u = 1 on unit u
                (importance=lora:  s_u = sum of |G (W + B A)| over its weights,  G = gB A + B gA - gB gA)
    every few:  mask the 1 - v(t) with the lowest I of each hidden vector;  v(t) falls to the budget by a cubic
    at the end: W <- W + B A, masked units are sliced off

Needs: training text, `steps` forward and backward passes with the model in memory, PEFT. Stores: narrower matrices, of the
same widths in all blocks with uniform=true. Differs from the reference code: the gradient of a gate, which is exact and costs
nothing, in place of the product of adapter gradients that stands for it; whole key-value heads with the query heads that
read them; all blocks are narrowed (there not the first tenth and the last one: protect); adapters are merged before
slicing; a training that is interrupted goes on. The default number of steps is for minutes on a few cores; the paper's
results come from thousands.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.gradual import Gradual
from corank.structured.recipe import LEARNED, Structured


@register("loraprune", family="structured", cite="arXiv:2305.18403")
def loraprune(
    attention: bool = True,
    importance: str = "gates",
    steps: int = 40,
    minutes: float | None = None,
    rank: int = 8,
    rate: float = 1e-4,
) -> Structured:
    """Heads and channels go a few at a time while adapters are tuned, by their gradients.

    Args:
        attention: take heads out too.
        importance: "gates", the gradient of a gate on each unit, or "lora", the paper's, from gradients of adapters.
        steps: of training, of two windows each.
        minutes: an earlier end by the clock.
        rank: of the adapters.
        rate: learning rate.
    """
    return Structured(
        units=("channels", "heads") if attention else ("channels",),
        score=LEARNED,
        learn=Gradual(steps, minutes, rank, rate=rate, importance=importance),
    )
