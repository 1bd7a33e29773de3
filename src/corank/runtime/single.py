"""Layers computed by one operation each, where its kernel suits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from corank.factors import LowRankLinear, RowPivotedLinear
from corank.factors.pivots import complement
from corank.kernels import lowrank_linear, pivot_linear, supports_lowrank_linear, supports_pivot_linear
from corank.runtime.override import Override, inference, note
from corank.runtime.packing import is_plain


class SingleLinear(Override):
    """B (A x) + b in one operation."""

    def compute(self, x: Tensor) -> Tensor:
        layer: Any = self.module
        if not inference() or not (is_plain(layer.down) and is_plain(layer.up)):
            return self.original(x)
        arguments = (x, layer.down.weight, layer.up.weight, layer.up.bias)
        reason = supports_lowrank_linear(*arguments)
        if reason is not None:
            note(f"no kernel computes a pair of factors: {reason}")
            return self.original(x)
        return lowrank_linear(*arguments)


class SinglePivoted(Override):
    """A row-pivoted layer in one operation."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._others: Tensor | None = None
        self._made_of: Any = None

    def others(self) -> Tensor:
        """The rows that are not pivots, int32; made again when the pivots have changed."""
        pivots: Any = self.module.pivots
        made_of = (pivots.data_ptr(), -1 if pivots.is_inference() else pivots._version, pivots.device)
        if self._others is None or made_of != self._made_of:
            self._others = complement(pivots, self.module.out_features).int()  # type: ignore[arg-type]
            self._made_of = made_of
        return self._others

    def compute(self, x: Tensor) -> Tensor:
        layer: Any = self.module
        if not inference() or not (is_plain(layer.down) and is_plain(layer.up)):
            return self.original(x)
        arguments = (x, layer.down.weight, layer.up.weight, layer.pivots, self.others(), layer.bias)
        reason = supports_pivot_linear(*arguments)
        if reason is not None:
            note(f"no kernel computes a pivoted layer: {reason}")
            return self.original(x)
        return pivot_linear(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_others": None, "_made_of": None}


def singles(model: nn.Module) -> list[Override]:
    """The overrides for every pair of factors and every row-pivoted layer; not yet in place."""
    kinds = {LowRankLinear: SingleLinear, RowPivotedLinear: SinglePivoted}
    return [kinds[type(m)](m) for m in model.modules() if type(m) in kinds]  # type: ignore[index]
