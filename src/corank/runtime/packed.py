"""One product for the first factors of q, k and v.

They are called one after the other by code that belongs to the architecture. The one that is called first
computes the common product and leaves the parts for the others on the input tensor itself: they find them only if they
are handed the very same tensor, unchanged, and nothing is left behind when it dies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corank.factors import FactorizedLinear, shape_of
from corank.model.archs import role_of
from corank.runtime.dispatch import Table, capturing, size_of
from corank.runtime.forms import is_linear
from corank.runtime.override import Override, inference, note
from corank.runtime.packing import Pending, Siblings, begins_plainly, stem_of

_ATTRIBUTE = "_corank_packed"
_TRIALS = 3


class Head(Override):
    """One of several layers with the same input.

    Args:
        module: the layer.
        index: its place among the siblings.
        family: what it shares with them.
    """

    def __init__(self, module: nn.Module, index: int, family: Family):
        super().__init__(module)
        self.index = index
        self.family = family

    def compute(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            y = self.family.traced(self.index, x)
        else:
            y = self.family.output(self.index, x) if inference() else None
        return self.original(x) if y is None else y

    def release(self) -> None:
        self.family.siblings.release()


class Family:
    """Siblings that are called one by one.

    A family whose members turn out to be called with different tensors stops computing ahead after a few trials.

    Args:
        siblings: the layers.
        table: decides by measurement whether they are packed; None packs them always.
    """

    def __init__(self, siblings: Siblings, table: Table | None = None):
        self.siblings = siblings
        self.table = table
        self.started = 0
        self.found = [0] * len(siblings.layers)
        self.chosen: dict[Any, str] = {}
        self.left: tuple[Tensor, list[Pending], int] | None = None

    def output(self, i: int, x: Tensor) -> Tensor | None:
        """The output of sibling i for x, or None if it has to compute that by itself."""
        left = vars(x).get(_ATTRIBUTE)
        if left is not None and left[0] is self and left[1] == _version(x) and i in left[2]:
            pending = left[2].pop(i)
            self.found[i] += 1
            if not left[2]:
                del vars(x)[_ATTRIBUTE]
            return self.siblings.finish(i, pending)
        if self._in_vain() or not self.siblings.intact():
            note("matrices are not called with one input after all, or somebody watches them; they are not packed")
            return None
        if self.table is not None and self._choose(x) == "torch":
            return None
        all_ = self.siblings.start(x)
        if all_ is None:
            return None
        self.started += 1
        others: dict[int, Pending] = {j: p for j, p in enumerate(all_) if j != i}
        vars(x)[_ATTRIBUTE] = (self, _version(x), others)
        return self.siblings.finish(i, all_[i])

    def traced(self, i: int, x: Tensor) -> Tensor | None:
        """The same for a compiler, which follows what is left here and removes it."""
        if self.siblings.downs.frozen is None or torch.is_grad_enabled():
            return None
        left = self.left
        if left is None or left[0] is not x:
            pending = self.siblings.start(x)
            if pending is None:
                return None
            left = (x, pending, 0)
        _, pending, fetched = left
        self.left = None if fetched + 1 == len(pending) else (x, pending, fetched + 1)
        return self.siblings.finish(i, pending[i])

    def _choose(self, x: Tensor) -> str:
        assert self.table is not None
        layers: Sequence[Any] = self.siblings.layers
        flat = x.reshape(-1, x.shape[-1])

        def apart() -> None:
            for layer in layers:
                type(layer).forward(layer, x)

        def together() -> None:
            for i, pending in enumerate(self.siblings.start(x) or []):
                self.siblings.finish(i, pending)

        size = size_of(flat)
        if size not in self.chosen:
            way = self.table.choose("qkv", layers, flat, {"torch": apart, "packed": together})
            if capturing(flat):
                return way
            self.chosen[size] = way
        return self.chosen[size]

    def _in_vain(self) -> bool:
        """Whether what is computed ahead is not fetched: all but the first to be called should find their part."""
        expected = (len(self.found) - 1) * self.started
        return self.started >= _TRIALS and sum(self.found) < expected / 2


def _version(x: Tensor) -> int:
    """Changes when x is changed in place; tensors of inference mode do not count."""
    return -1 if x.is_inference() else x._version


def packed_heads(
    model: nn.Module, grouped: bool | None = None, kernel: bool = False, table: Table | None = None
) -> list[Override]:
    """The overrides that pack q, k and v of every attention; not yet in place. Arguments as for `Siblings`, `Family`."""
    found: list[Override] = []
    for layers in _families(model):
        family = Family(Siblings(layers, grouped, kernel), table)
        found += [Head(layer, i, family) for i, layer in enumerate(layers)]
    return found


def _families(model: nn.Module) -> Iterator[list[nn.Module]]:
    """q, k and v with one parent and one input size, of which at least one is factorized."""
    taken: set[int] = set()
    for module in model.modules():
        roles = {role_of(name): child for name, child in module.named_children() if is_linear(child)}
        layers = [roles[role] for role in ("q", "k", "v") if role in roles]
        if any(isinstance(layer, FactorizedLinear) for layer in layers):
            kept = [layer for layer in layers if "forward" not in vars(layer)]
            kept = [layer for layer in kept if begins_plainly(layer, layers) and id(stem_of(layer)) not in taken]
            if len(kept) > 1 and len({shape_of(layer)[1] for layer in kept}) == 1:
                taken |= {id(stem_of(layer)) for layer in kept}
                yield kept
