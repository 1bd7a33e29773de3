"""Attention as factors: how many parameters each of its four matrices gets, and their weighted truncation (LoRAP).

Values and outputs keep alpha times the parameters of queries and keys (Li et al., ICML 2024, arXiv:2404.09695). With A the
parameters that the attention of a block may have and k (m + n) those of a matrix [m, n] at rank k, both matrices of a pair get
the same share of their own:

    v, o   f = A alpha / (1 + alpha) / (m_v n_v + m_o n_o),    k = floor(f m n / (m + n));    q, k likewise with A / (1 + alpha)

For square matrices of width d these are the paper's ranks, (1 - s) d / 2 * 2 alpha / (1 + alpha) and (1 - s) d / 2 * 2 / (1 + alpha).
A pair whose share is 1 or more stays dense, and the other one gets what is left. With D = diag(E[x_j^2])^{1/2} each matrix
becomes the best of its rank for || (W - B A) D ||_F.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from corank.factors import LowRank, replace, weight_of
from corank.linalg import truncate
from corank.model.site import Site
from corank.structured.block import Block
from corank.structured.moments import Moments

SPEND, SAVE = ("v", "o"), ("q", "k")
"""Roles of the pair that gets more, and of the one that pays for it."""


def matrices(sites: Sequence[Site]) -> dict[str, Site]:
    """Role -> site of the four matrices of a block's attention; empty if they are not one each."""
    found: dict[str, Site] = {}
    for site in sites:
        if site.role in (*SPEND, *SAVE):
            plain = site.form == "linear" and site.pool is None and site.tied is None and site.refusal is None
            if not plain or site.role in found:
                return {}
            found[site.role] = site
    return found if len(found) == 4 else {}


def missing(blocks: Sequence[Sequence[Site]]) -> list[str]:
    """A sentence if there are blocks whose attention has to stay dense."""
    without = [sites for sites in blocks if not matrices(sites)]
    if not without:
        return []
    where = without[0][0].name.rpartition(".")[0] if without[0] else "a block without matrices"
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    return [f"The attention around {where}{more} stays dense: it has no q, k, v and o projections of their own."]


def split(attention: Mapping[str, Site], budget: float, alpha: float) -> dict[str, int]:
    """Name of a matrix -> rank, for those that become factors.

    Args:
        attention: role -> site, from `matrices`.
        budget: parameters that the four may have together.
        alpha: parameters of v and o over those of q and k.
    """
    size = {pair: sum(attention[role].numel for role in pair) for pair in (SPEND, SAVE)}
    spend = budget * alpha / (1 + alpha)
    if spend >= size[SPEND]:
        given = {SPEND: float(size[SPEND]), SAVE: budget - size[SPEND]}
    elif budget - spend >= size[SAVE]:  # only where alpha is below 1
        given = {SPEND: budget - size[SAVE], SAVE: float(size[SAVE])}
    else:
        given = {SPEND: spend, SAVE: budget - spend}
    ranks: dict[str, int] = {}
    for pair, parameters in given.items():
        share = parameters / size[pair]
        for role in pair if share < 1 - 1e-12 else ():
            m, n = attention[role].shape
            ranks[attention[role].name] = max(math.floor(share * m * n / (m + n) + 1e-9), 1)
    return ranks


def factorize(block: Block, ranks: Mapping[str, int], known: Mapping[str, Moments]) -> None:
    """Replace matrices of a block by two factors each, in place.

    Args:
        block: whose matrices are plain linear layers.
        ranks: path inside the block -> rank.
        known: path -> moments of its input.
    """
    for path, rank in ranks.items():
        old: Any = block.module.get_submodule(path)
        W = weight_of(old).double()
        # a channel that never speaks weighs nothing, and is projected with the others: no inverse is taken
        B, A = truncate(W, known[path].energy, rank=rank).pair(W, rank)
        bias = None if old.bias is None else old.bias.detach()
        made: torch.nn.Module = LowRank(B, A).astype(old.weight.dtype).module(bias)
        for p in made.parameters():
            p.requires_grad_(old.weight.requires_grad)
        replace(block.module, path, made)
