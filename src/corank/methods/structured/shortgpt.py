"""ShortGPT: the blocks that turn their input least go (Men et al. 2024, arXiv:2403.03853).

    BI_l = 1 - E_t [ x_l,t . x_l+1,t / (|x_l,t| |x_l+1,t|) ];   remove the blocks of lowest BI until the budget is met.

Needs: one pass of calibration text. Stores: a smaller model of the same class.
The reference code counts padding and, for the last block, the state after the final norm; here only real tokens count, each
block is judged by what it returns itself, and the first token of a window is left out.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.depth import Depth, Selection
from corank.structured.recipe import Structured


def least_influence(case: Depth) -> Selection:
    """The blocks of lowest influence, as few as meet the budget."""
    removed: list[int] = []
    for layer in sorted(case.free, key=lambda i: case.walk.changes[i]):
        if case.enough(removed):
            break
        removed.append(layer)
    return Selection(tuple(removed))


@register("shortgpt", family="structured", cite="arXiv:2403.03853")
def shortgpt() -> Structured:
    """Take away the blocks that change the direction of the hidden state least."""
    return Structured(depth=least_influence, statistics=("influence",))
