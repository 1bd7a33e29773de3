"""SLEB: blocks go one by one, each time the one that is missed least (Song et al. 2024, arXiv:2402.09025).

    repeat until the budget is met:  remove argmin_l  loss( model without l and those removed before )

Needs: calibration text, L + (L - 1) + ... runs of part of the model. Stores: a smaller model of the same class.
A round reads every block once and runs all candidates through it, which takes the memory of L sets of calibration
activations: a few windows are enough (--samples 8).
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.depth import Depth, Selection
from corank.structured.recipe import Structured


def one_by_one(case: Depth) -> Selection:
    """Greedy: the block whose removal leaves the lowest loss, until the budget is met."""
    removed: list[int] = []
    while not case.enough(removed) and len(removed) < len(case.free):
        losses = case.losses_without(removed)
        removed.append(min(losses, key=lambda layer: losses[layer]))
    return Selection(tuple(removed))


@register("sleb", family="structured", cite="arXiv:2402.09025")
def sleb() -> Structured:
    """Take away blocks one by one, by the loss on calibration text without them."""
    return Structured(depth=one_by_one, statistics=("loss",))
