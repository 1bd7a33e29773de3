"""Compresso: masks learned together with adapters (Guo et al. 2023, arXiv:2310.05015).

    z = clamp(1.2 sigmoid((logit(u) + log_alpha) / beta) - 0.1, 0, 1),  u ~ U(0, 1)   on channels, heads, hidden dimensions
    min over log_alpha and LoRA, max over l1, l2:   loss + l1 (s - t) + l2 (s - t)^2
    s = 1 - E[hidden] / d * (sum of E[z_u > 0] cost_u + rest) / parameters;   t rises to the budget

    at the end:  W <- W + B A;  gates of survivors go into the weights;  the rest is sliced off

Needs: training text, `steps` forward and backward passes with the model in memory, PEFT. Stores: narrower matrices and a
smaller hidden size, in one model of the same family. Differs from the reference code: whole key-value heads; one shift of all
gates meets the budget exactly in place of rounding what the multipliers have reached; a masked dimension of the residual
stream is zero for the norms, which divide by the dense size, so that nothing jumps when it goes; learning rates
of gates and multipliers are scaled to the number of steps; gates begin in the order of what their units change to first
order (prior=none: all alike, at P(z = 0) = 0.01, as in the paper), because dozens of steps tell little else; the
fine-tuning at the end is a quarter of the steps. The paper's prompt, which tells the model that it is being pruned, and without which its
results should not be compared, is `prompt`; the report says if there was one, and evaluation needs the same.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.l0 import L0
from corank.structured.recipe import LEARNED, Structured


@register("compresso", family="structured", cite="arXiv:2310.05015")
def compresso(
    attention: bool = True,
    hidden: bool = True,
    steps: int = 40,
    minutes: float | None = None,
    rank: int = 8,
    rate: float = 1e-4,
    prior: str = "first-order",
    prompt: str = "",
) -> Structured:
    """Channels, heads and hidden dimensions learn to go, by gates under a Lagrangian, while adapters are tuned.

    Args:
        attention: take heads out too.
        hidden: make the hidden size smaller too, where the family allows it and no block is protected.
        steps: of training, of two windows each.
        minutes: an earlier end by the clock.
        rank: of the adapters on queries and values; 0: none.
        rate: their learning rate.
        prior: order in which gates begin, "first-order" or "none".
        prompt: text that is put before every window.
    """
    return Structured(
        units=("channels", "heads") if attention else ("channels",),
        score=LEARNED,
        learn=L0(steps, minutes, rank, rate=rate, hidden=hidden, prior=prior),
        prompt=prompt,
    )
