"""MKA: similar neighbouring blocks are merged, not dropped (Liu et al. 2024, arXiv:2406.16330).

    Y_l = diffusion map of the hidden states after block l, 2 coordinates, as ranks;  S_ij = I(Y_i, Y_j) / sqrt(H(Y_i) H(Y_j))
    repeat:  (i, j) the neighbours of highest S;  a = sigmoid( beta s_i / (s_i + s_j) ), s the mean of a row of S;
             matrices of i <- a (of i) + (1 - a) (of j);  block j goes

Needs: one pass of calibration text; of each window, the mean hidden state after every block (--samples 64 or more: the
estimates want points). Stores: a smaller model of the same class.
The released code merges into a copy that it throws away, and always at the end: it drops the last blocks. Here the matrices are
merged where S says. As a lies in [0.5, 0.73], merging is a mean of two blocks: expect it to lose more than dropping.
"""

from __future__ import annotations

import math

from corank.recipe import register
from corank.structured.depth import Depth, Selection
from corank.structured.manifold import similarities
from corank.structured.recipe import Structured


def share(s_i: float, s_j: float, beta: float) -> float:
    """The weight a of the block that stays."""
    return 1 / (1 + math.exp(-beta * (s_i / (s_i + s_j) if s_i + s_j else 0.5)))


@register("mka", family="structured", cite="arXiv:2406.16330")
def mka(beta: float = 1.0) -> Structured:
    """Merge neighbouring blocks whose hidden states are most alike.

    Args:
        beta: how much the more similar of two blocks counts.
    """

    def merge_neighbours(case: Depth) -> Selection:
        if case.enough(()):
            return Selection(())
        S = similarities(case.walk.means[1:])
        rows = ((S.sum(1) - S.diagonal()) / max(case.layers - 1, 1)).tolist()
        mixes = {i: {i: 1.0} for i in range(case.layers)}  # of blocks that are left, in order
        removed: list[int] = []
        while not case.enough(removed):
            left = list(mixes)
            pairs = [(i, j) for i, j in zip(left, left[1:], strict=False) if {i, j} <= set(case.free)]
            if not pairs:
                break
            i, j = max(pairs, key=lambda pair: float(S[max(mixes[pair[0]]), max(mixes[pair[1]])]))
            a = share(rows[i], rows[j], beta)
            mixes[i] = {k: a * w for k, w in mixes[i].items()} | {k: (1 - a) * w for k, w in mixes.pop(j).items()}
            removed.append(j)
        return Selection(tuple(removed), {i: mix for i, mix in mixes.items() if len(mix) > 1})

    return Structured(depth=merge_neighbours, merge=True, statistics=("means",))
