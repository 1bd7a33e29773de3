"""The unreasonable ineffectiveness of the deeper layers (Gromov et al. 2024, arXiv:2403.17887).

    d(l, n) = E arccos( x_l . x_l+n / (|x_l| |x_l+n|) ) / pi  at the last token of a window;
    remove the n blocks in a row, l .. l+n-1, of the smallest d(l, n); n as small as the budget allows.

Needs: one pass of calibration text, the state at the last token at every boundary. Stores: a smaller model of the same class.
"""

from __future__ import annotations

from corank.recipe import register
from corank.statistics.angular import angle
from corank.structured.depth import Depth, Selection
from corank.structured.recipe import Structured


def nearest_ends(case: Depth) -> Selection:
    """The span of blocks whose ends are nearest in angle, among the shortest that meet the budget."""
    ends = case.walk.ends if not case.enough(()) else []
    for n in range(case.layers):
        spans = [tuple(range(l, l + n)) for l in range(case.layers - n + 1)]
        spans = [span for span in spans if set(span) <= set(case.free) and case.enough(span)]
        if spans:
            return Selection(min(spans, key=lambda s: float(angle(ends[s[0]], ends[s[-1] + 1]).mean()) if s else 0.0))
    return Selection(())  # protected blocks are in the way of every span; the driver says so


@register("angular", family="structured", cite="arXiv:2403.17887")
def angular() -> Structured:
    """Take away the blocks in a row across which the hidden state turns least."""
    return Structured(depth=nearest_ends, statistics=("ends",))
