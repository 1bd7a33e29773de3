"""Back to the widths that a configuration describes: units that are not there are stored as zeros, and change nothing.

A unit whose rows in its producers and columns in its consumer are zero adds nothing to what is read, whatever lies
between: what an activation makes of a channel meets zeros, and so does the output of a head. Widening is the inverse of
narrowing on the units that are left: the model computes what it did, in the shapes of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from corank.factors import weight_of
from corank.model.site import Site
from corank.structured.narrow import put
from corank.structured.shape import BlockShape, places_after, set_attributes


def widen(
    module: nn.Module,
    sites: Sequence[Site],
    prefix: str,
    config: PretrainedConfig,
    before: BlockShape,
    after: BlockShape,
) -> None:
    """Give a narrowed block the widths of the source, in place.

    Args:
        module: the block, dense.
        sites: its matrices as the source has them.
        prefix: path of the block, with a dot at the end.
        config: of the model.
        before: widths of the block.
        after: widths of the source.
    """
    for site in sites:
        path = site.name.removeprefix(prefix)
        old: Any = module.get_submodule(path)
        rows, columns = places_after(site, before, after)
        if (len(rows), len(columns)) == site.shape:
            continue
        W = _spread(_spread(weight_of(old), rows, site.shape[0]).mT, columns, site.shape[1]).mT
        put(module, path, W, None if old.bias is None else _spread(old.bias, rows, site.shape[0]))
    set_attributes(module, config, before, after)


def _spread(rows: Tensor, places: Sequence[int], m: int) -> Tensor:
    """m rows of which those at some places are given and the others are zero."""
    wide = rows.new_zeros(m, *rows.shape[1:])
    wide[torch.tensor(places, device=rows.device)] = rows.detach()
    return wide
