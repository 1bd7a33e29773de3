"""Index sets of the interpolative kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from corank.errors import CorankError


def complement(pivots: Tensor, size: int) -> Tensor:
    """The indices 0..size-1 that are not pivots, ascending, int64 [size - k]."""
    mask = torch.ones(size, dtype=torch.bool, device=pivots.device)
    mask[pivots.long()] = False
    return mask.nonzero().squeeze(1)


def check_pivots(kind: str, pivots: Tensor, size: int) -> None:
    """Raise `CorankError` unless the pivots are distinct indices below `size`."""
    if pivots.is_meta or pivots.numel() == 0:
        return
    if pivots.min() < 0 or pivots.max() >= size or pivots.unique().numel() != pivots.numel():
        raise CorankError(f"{kind}: pivots must be distinct indices below {size}.")
