"""Matrices that are applied to the same input, stored under one another, so that one product does for all of them.

(p_q, p_k, p_v) = x [A_q; A_k; A_v]^T: a step of decoding is bound by the number of launches, and this removes most of
those that a factorized layer has more than a dense one. Nothing is stored twice: the parameters become views into the
common tensor, under their own names and with their own gradients, so that a change in place is seen at once. What
gives a parameter other storage (a move to another device or dtype, loading by assignment) is noticed by its address,
and the tensor is put together again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corank.factors import (
    CURLinear,
    DenseLinear,
    LowRankLinear,
    RowPivotedLinear,
    SharedLowRankLinear,
)
from corank.kernels import lowrank_ups, supports_lowrank_ups
from corank.runtime.override import Override, note

_WITH_FACTORS = (LowRankLinear, SharedLowRankLinear, CURLinear, RowPivotedLinear)


def is_plain(layer: Any) -> bool:
    """Whether a layer is an nn.Linear on an ordinary matrix, with nobody watching it."""
    if type(layer) not in (nn.Linear, DenseLinear) or unwatched(layer) is False:
        return False
    weight = layer.weight
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta


def unwatched(layer: nn.Module) -> bool:
    """Whether no hook runs when the layer is called and nobody but a runtime has replaced its forward."""
    forward = vars(layer).get("forward")
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return not hooked and (forward is None or isinstance(forward, Override))


def stem_of(layer: nn.Module) -> nn.Linear | None:
    """The linear layer whose product with the input is the first thing a layer computes; None if there is none.

    That of a dense layer is the layer itself; a column-pivoted one picks entries of its input first.
    """
    if type(layer) in _WITH_FACTORS:
        layer = layer.down  # type: ignore[assignment]
        return layer if is_plain(layer) and layer.bias is None else None  # type: ignore[return-value]
    return layer if type(layer) in (nn.Linear, DenseLinear) and _ordinary(layer) else None  # type: ignore[return-value]


def begins_plainly(layer: nn.Module, siblings: Sequence[nn.Module]) -> bool:
    """Whether a layer's first product can go together with those of its siblings."""
    if stem_of(layer) is None:
        note(f"{type(layer).__name__} does not begin with a plain product; it is not packed")
        return False
    if isinstance(layer, SharedLowRankLinear) and all(layer.down is not stem_of(o) for o in siblings if o is not layer):
        note("a basis is stored with a layer that reads another input; its product is not packed")
        return False
    return True


def _ordinary(layer: Any) -> bool:
    return type(layer.weight) is nn.Parameter and layer.weight.is_floating_point() and not layer.weight.is_meta


def tail(layer: Any, z: Tensor) -> Tensor:
    """The rest of a layer's forward, from the product z [..., k] of its stem with the input."""
    if isinstance(layer, RowPivotedLinear):
        y = torch.cat([z, layer.up(z)], dim=-1)
        y = y if layer.in_order else y.index_select(-1, layer.index)
        return y if layer.bias is None else y + layer.bias
    if isinstance(layer, CURLinear):
        return layer.up(layer.link(z))
    if isinstance(layer, LowRankLinear | SharedLowRankLinear):
        return layer.up(z)
    return z if layer.bias is None else z + layer.bias


class Stack:
    """Weights [m_i, n] of linear layers as one tensor [sum m_i, n] of which they are views.

    Args:
        layers: distinct linear layers with one `in_features`.

    Attributes:
        frozen: the common tensor, while a compiler may rely on it: it cannot see whether the storage still holds.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers = tuple(layers)
        self.frozen: Tensor | None = None
        self._whole: Tensor | None = None

    def weight(self) -> Tensor | None:
        """The common tensor; None if the weights differ in dtype or device and cannot be put together."""
        if torch.compiler.is_compiling():
            return self.frozen
        whole, weights = self._whole, [layer.weight for layer in self.layers]
        if whole is None or not self._holds(whole, weights):
            whole = self._whole = self._together(weights)
        return whole

    @staticmethod
    def _holds(whole: Tensor, weights: list[Tensor]) -> bool:
        address, size, row = whole.data_ptr(), whole.element_size(), 0
        for w in weights:
            if w.dtype != whole.dtype or w.device != whole.device:
                return False
            rows = w.shape[0]
            if rows and w.data_ptr() != address + row * w.shape[1] * size:
                return False
            row += rows
        return row == whole.shape[0]

    @staticmethod
    def _together(weights: list[Tensor]) -> Tensor | None:
        first = weights[0]
        if any((w.dtype, w.device, w.shape[1:]) != (first.dtype, first.device, first.shape[1:]) for w in weights):
            note("matrices of different dtypes or devices read one input; they are not packed")
            return None
        if any(w.is_meta or type(w) not in (Tensor, nn.Parameter) for w in weights):
            note("matrices that are not ordinary tensors read one input; they are not packed")
            return None
        first = next((w for w in weights if w.numel()), first)
        if Stack._adjacent(weights):  # a copy of the model that shares its parameters has put them together
            rows = sum(w.shape[0] for w in weights)
            return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
        # Not an inference tensor, even when the first call comes from inference mode: the parameters would become one.
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat([w.detach() for w in weights])
            for w, view in zip(weights, whole.split([w.shape[0] for w in weights]), strict=True):
                if w.numel():
                    w.data = view
        return whole

    @staticmethod
    def _adjacent(weights: list[Tensor]) -> bool:
        """Whether the weights follow one another in one storage already."""
        filled = [w for w in weights if w.numel()]
        follows = all(b.data_ptr() == a.data_ptr() + a.nbytes for a, b in itertools.pairwise(filled))
        storages = {w.untyped_storage().data_ptr() for w in filled}
        return len(filled) > 1 and follows and len(storages) == 1 and all(w.is_contiguous() for w in filled)

    def release(self) -> None:
        """Give every weight storage of its own again."""
        whole, self._whole = self._whole, None
        if whole is None or not self._holds(whole, [layer.weight for layer in self.layers]):
            return
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.layers:
                if layer.weight.numel():
                    layer.weight.data = layer.weight.detach().clone()

    def __getstate__(self) -> dict[str, Any]:
        # The parameters of a copied or unpickled model have storage of their own.
        return {**vars(self), "_whole": None, "frozen": None}


@dataclass
class Pending:
    """A sibling's output, or what `tail` makes it from."""

    value: Tensor
    done: bool


class Siblings:
    """Layers that read the same input.

    Args:
        layers: each with a stem.
        grouped: also take the second factors together where their sizes allow it: those on one basis as one matrix,
            those of equal sizes as one batched product. None: on CUDA, where a launch costs more than it computes.
        kernel: take second factors of any sizes together in one kernel where it suits.
    """

    def __init__(self, layers: Sequence[nn.Module], grouped: bool | None = None, kernel: bool = False):
        self.layers = tuple(layers)
        self.grouped = grouped
        self.kernel = kernel
        self.stems = [stem_of(layer) for layer in layers]
        if None in self.stems:
            raise ValueError("every sibling needs a stem")
        distinct = list({id(stem): stem for stem in self.stems}.values())
        self.place = [[id(d) for d in distinct].index(id(stem)) for stem in self.stems]
        self.downs = Stack(distinct)  # type: ignore[arg-type]
        self.groups = [(members, Stack([layers[i].up for i in members])) for members in self._groups()]  # type: ignore[misc]

    def _groups(self) -> list[list[int]]:
        """Sets of siblings whose second factors go together."""
        with_up = [i for i, layer in enumerate(self.layers) if isinstance(layer, LowRankLinear | SharedLowRankLinear)]
        layers: list[Any] = list(self.layers)
        with_up = [i for i in with_up if is_plain(layers[i].up) and layers[i].rank > 0]
        sets: list[list[int]] = []
        for i in with_up:
            last = sets[-1] if sets else None
            if last is not None and last[-1] == i - 1 and self._together(last, i):
                last.append(i)
            else:
                sets.append([i])
        return [members for members in sets if len(members) > 1]

    def _together(self, members: list[int], i: int) -> bool:
        a, b = self.layers[members[-1]], self.layers[i]
        if self.place[members[0]] == self.place[i]:
            return True
        alike = (a.rank, a.out_features) == (b.rank, b.out_features)
        return alike and self.place[i] == self.place[members[-1]] + 1

    def intact(self) -> bool:
        """Whether the siblings are still made of the layers they were made of, with nobody watching the first ones."""
        for layer, stem in zip(self.layers, self.stems, strict=True):
            if layer is stem:
                continue
            if layer.down is not stem or not unwatched(stem):  # type: ignore[arg-type]
                return False
        return True

    def ups_intact(self, members: list[int], stack: Stack) -> bool:
        """The same of the second factors of a group."""
        return all(self.layers[i].up is up and unwatched(up) for i, up in zip(members, stack.layers, strict=True))

    def start(self, x: Tensor) -> list[Pending] | None:
        """Everything that is computed at once, for x [..., in]; None if the matrices cannot be packed."""
        A = self.downs.weight()
        if A is None or A.dtype != x.dtype:
            return None
        z = F.linear(x, A)
        parts = z.split([stem.weight.shape[0] for stem in self.downs.layers], dim=-1)
        pending = [Pending(parts[place], False) for place in self.place]
        compiling = torch.compiler.is_compiling()
        if self.kernel and not compiling and self._by_kernel(z, pending):
            return pending
        if x.is_cuda if self.grouped is None else self.grouped:
            for members, stack in self.groups:
                if compiling or self.ups_intact(members, stack):
                    self._up(members, stack, z, pending)
        return pending

    def _by_kernel(self, z: Tensor, pending: list[Pending]) -> bool:
        """Whether one kernel has computed the second factors of at least two siblings."""
        layers: list[Any] = list(self.layers)
        members = [i for i, p in enumerate(layers) if type(p) in (LowRankLinear, SharedLowRankLinear) and p.rank > 0]
        if not all(is_plain(layers[i].up) for i in members):
            return False
        begins = [0, *itertools.accumulate(stem.weight.shape[0] for stem in self.downs.layers)]
        weights, biases = [layers[i].up.weight for i in members], [layers[i].up.bias for i in members]
        offsets = [begins[self.place[i]] for i in members]
        reason = supports_lowrank_ups(z, weights, biases, offsets)
        if reason is not None:
            note(f"no kernel computes second factors together: {reason}")
            return False
        for i, y in zip(members, lowrank_ups(z, weights, biases, offsets), strict=True):
            pending[i] = Pending(y, True)
        return True

    def _up(self, members: list[int], stack: Stack, z: Tensor, pending: list[Pending]) -> None:
        B = stack.weight()
        if B is None:
            return
        if len({self.place[i] for i in members}) == 1:
            outputs = F.linear(pending[members[0]].value, B).split([up.weight.shape[0] for up in stack.layers], dim=-1)
        else:
            k, rank = len(members), stack.layers[0].weight.shape[1]
            offset = sum(stem.weight.shape[0] for stem in self.downs.layers[: self.place[members[0]]])
            p = z.reshape(-1, z.shape[-1])[:, offset : offset + k * rank].unflatten(1, (k, rank))
            y = torch.bmm(p.transpose(0, 1), B.view(k, -1, rank).transpose(1, 2))
            outputs = tuple(y.unflatten(1, z.shape[:-1]))
        for i, up, y in zip(members, stack.layers, outputs, strict=True):
            pending[i] = Pending(y if up.bias is None else y + up.bias, True)

    def freeze(self) -> list[Stack]:
        """Let a compiler use the common tensors until they are thawed; those that cannot be put together are left out."""
        if not self.intact():
            return []
        stacks = [self.downs, *(stack for members, stack in self.groups if self.ups_intact(members, stack))]
        for stack in stacks:
            stack.frozen = stack.weight()
            if stack.frozen is not None:
                torch._dynamo.mark_static_address(stack.frozen)  # a graph reads it where it lies
        return stacks

    def finish(self, i: int, pending: Pending) -> Tensor:
        """The output of sibling i."""
        return pending.value if pending.done else tail(self.layers[i], pending.value)

    def release(self) -> None:
        """Give every matrix storage of its own again."""
        for stack in (self.downs, *(stack for _, stack in self.groups)):
            stack.release()
