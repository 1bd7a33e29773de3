"""Second factors stored column by column, on a processor.

A matrix is applied to one token in the time it takes to read it, and long runs of memory are read faster than short ones. A
second factor B [m, k] has rows of only k numbers, and a library's product goes along them. Its columns are m long: stored
one after the other they are read half as fast again (measured: docs/log.md), and for many tokens it makes no difference.
Values, shapes and names stay what they were; what changes are the strides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corank.factors import CURLinear, LowRankLinear, RowPivotedLinear, SharedLowRankLinear
from corank.runtime.override import Override
from corank.runtime.packing import is_plain

TALL = 2
"""Least ratio of rows to columns."""
SMALL = 1 << 15
"""Entries below which the call takes longer than the reading."""


class Turned(Override):
    """The product with a matrix that lies in memory column by column.

    Args:
        module: a linear layer whose weight is to be stored so.
    """

    def __init__(self, module: nn.Linear):
        super().__init__(module)
        turn(module.weight)

    def compute(self, x: Tensor) -> Tensor:
        layer: Any = self.module
        return F.linear(x, layer.weight, layer.bias)

    def release(self) -> None:
        weight: Any = self.module.weight
        if weight.stride(0) == 1:
            with torch.inference_mode(False), torch.no_grad():
                weight.data = weight.detach().contiguous()


def turn(weight: Tensor) -> None:
    """Store a matrix column by column, in place."""
    with torch.inference_mode(False), torch.no_grad():
        weight.data = weight.detach().mT.contiguous().mT


def turned(model: nn.Module) -> list[Override]:
    """The overrides for every tall second factor in float32 on a processor; their weights are stored anew at once."""
    kinds = (LowRankLinear, SharedLowRankLinear, CURLinear, RowPivotedLinear)
    ups: list[Any] = [m.up for m in model.modules() if type(m) in kinds and is_plain(m.up)]
    return [Turned(up) for up in dict.fromkeys(ups) if "forward" not in vars(up) and _gains(up.weight)]


def _gains(W: Tensor) -> bool:
    m, k = W.shape
    return W.dtype == torch.float32 and W.device.type == "cpu" and k > 0 and m >= TALL * k and m * k >= SMALL
