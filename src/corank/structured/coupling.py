"""Channels of convolutions that belong together, found by running the model once without weights.

A channel of a hidden feature map is made by a row of one convolution or, where residual branches are added, by a row of
each of several; batch norms, depthwise convolutions and elementwise functions work on it alone; convolutions and linear layers
read it. Nothing is known of architectures: tensors are followed through the functions that the forward pass calls. What is not
among those known here, what the model returns and what it is given keep their channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from corank.errors import CorankError
from corank.model.archs import dummy_inputs, meta_inputs

ALONE = frozenset(
    """relu relu_ relu6 gelu silu hardswish hardsigmoid hardtanh hardtanh_ leaky_relu leaky_relu_ elu mish sigmoid sigmoid_
    tanh clamp clone contiguous detach float to dropout dropout_ max_pool2d _max_pool2d avg_pool2d adaptive_avg_pool2d
    adaptive_max_pool2d interpolate pad boolean_dispatch""".split()
)
"""Functions that treat every channel alike and alone."""
TOGETHER = frozenset("add __add__ __iadd__ __radd__ add_ iadd mul __mul__ __imul__ __rmul__ mul_".split())
"""Functions that combine channel j of one feature map with channel j of another."""


@dataclass
class Axis:
    """One dimension of a tensor of the model that has an entry for every channel, or several neighbouring ones.

    Attributes:
        tensor: name of a parameter or buffer.
        dim: which dimension.
        times: entries per channel.
    """

    tensor: str
    dim: int
    times: int = 1


@dataclass
class Channels:
    """Channels that only go together.

    Attributes:
        count: how many.
        made: axes of what makes them and what works on them alone; averaged when channels are merged.
        read: axes of what reads them; added up.
        norms: path of a batch norm -> path of the convolution right before it, "" if that is something else.
    """

    count: int
    made: list[Axis] = field(default_factory=list)
    read: list[Axis] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)
    fixed: bool = False


def coupled(model: Any, example: Mapping[str, Any] | None = None) -> list[Channels]:
    """The groups of channels of a model that can be merged, in the order in which it makes them.

    Args:
        model: on any device; one without weights is built from its configuration.
        example: model inputs of the shapes that will come.

    Raises:
        CorankError: the model cannot be run.
    """
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.eval()
    inputs = dummy_inputs(empty) if example is None else meta_inputs(example)
    follow = _Follow(empty)
    try:
        with torch.no_grad(), follow:
            out = empty(**inputs)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CorankError(
            f"{type(model).__name__} could not be run to see which channels belong together: {reason}"
        ) from error
    for tensor in _tensors(out):
        follow.fix(tensor)
    return [group for group in follow.groups() if not group.fixed and group.made and group.read]


class _Follow(TorchFunctionMode):
    """Follows feature maps [batch, channels, height, width] and what becomes of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.owners = {id(m.weight): (name, m) for name, m in model.named_modules() if _weighted(m)}
        self.known: dict[int, tuple[Tensor, int, int]] = {}  # tensor (kept alive), group, entries per channel
        self.made_by: dict[int, str] = {}
        self.all: list[Channels] = []
        self.parent: list[int] = []
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in _tensors((args, kwargs)) if id(t) in self.known]
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        handled = self._handle(name, args, kwargs, out) if isinstance(out, Tensor) else False
        if not handled and any(True for _ in _tensors(out)):
            for tensor in given:
                self.fix(tensor)
        return out

    def _handle(self, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
        if name == "conv2d":
            return self._convolution(_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"), out)
        if name == "batch_norm":
            return self._norm(
                _argument(args, kwargs, 0, "input"), kwargs.get("weight", args[3] if len(args) > 3 else None), out
            )
        if name == "linear":
            return self._linear(_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"))
        x = args[0] if args else None
        if not isinstance(x, Tensor):
            return False
        if name in TOGETHER:
            return self._together(x, args[1] if len(args) > 1 else None, out)
        seen = self.known.get(id(x))
        if seen is None:
            return True  # nothing that is followed
        _, group, times = seen
        if name in ALONE and out.dim() == x.dim() and out.shape[1] == x.shape[1]:
            return self._note(out, group, times)
        if name in ("flatten", "view", "reshape", "squeeze", "mean") and out.dim() == 2:
            if name == "mean" and (x.dim() != 4 or out.shape[1] != x.shape[1]):
                return False
            count = self.all[self._root(group)].count
            if out.shape[0] == x.shape[0] and out.shape[1] % count == 0:
                return self._note(out, group, out.shape[1] // count)
        return False

    def _convolution(self, x: Tensor, weight: Tensor, out: Tensor) -> bool:
        name, layer = self.owners.get(id(weight), ("", None))
        if layer is None or name in self.used or not isinstance(layer, nn.Conv2d):
            return False
        self.used.add(name)
        seen = self.known.get(id(x))
        rows = [Axis(f"{name}.weight", 0)] + ([Axis(f"{name}.bias", 0)] if layer.bias is not None else [])
        if layer.groups > 1:
            if seen is None or layer.groups != layer.in_channels or layer.out_channels != layer.in_channels:
                return False
            self.all[self._root(seen[1])].made += rows
            return self._note(out, seen[1], 1, name)
        if seen is not None:
            self.all[self._root(seen[1])].read.append(Axis(f"{name}.weight", 1))
        self.all.append(Channels(layer.out_channels, rows))
        self.parent.append(len(self.parent))
        return self._note(out, len(self.parent) - 1, 1, name)

    def _norm(self, x: Tensor, weight: Any, out: Tensor) -> bool:
        name, layer = self.owners.get(id(weight), ("", None))
        seen = self.known.get(id(x))
        if seen is None:
            return True
        if layer is None or name in self.used or x.dim() != 4:
            return False
        self.used.add(name)
        group = self.all[self._root(seen[1])]
        group.made += [Axis(f"{name}.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var")]
        group.norms[name] = self.made_by.get(id(x), "")
        return self._note(out, seen[1], 1)

    def _linear(self, x: Tensor, weight: Tensor) -> bool:
        name, _ = self.owners.get(id(weight), ("", None))
        seen = self.known.get(id(x))
        if seen is None:
            return True
        if not name or name in self.used or x.dim() != 2:
            return False
        self.used.add(name)
        self.all[self._root(seen[1])].read.append(Axis(f"{name}.weight", 1, seen[2]))
        return True

    def _together(self, x: Tensor, other: Any, out: Tensor) -> bool:
        mine = self.known.get(id(x))
        if not isinstance(other, Tensor) or other.dim() == 0:
            return mine is None or self._note(out, mine[1], mine[2])
        theirs = self.known.get(id(other))
        if mine is None and theirs is None:
            return True
        same = x.dim() == other.dim() == out.dim() and x.shape[1] == other.shape[1]
        if mine is None or theirs is None or not same or mine[2] != theirs[2]:
            return False
        a, b = self._root(mine[1]), self._root(theirs[1])
        if a != b:
            into, gone = min(a, b), max(a, b)
            first, second = self.all[into], self.all[gone]
            first.made += second.made
            first.read += second.read
            first.norms |= second.norms
            first.fixed |= second.fixed
            self.parent[gone] = into
        return self._note(out, a, mine[2])

    def _note(self, out: Tensor, group: int, times: int, made_by: str = "") -> bool:
        self.known[id(out)] = (out, group, times)
        self.made_by.pop(id(out), None)  # the same object after a function in place is another feature map
        if made_by:
            self.made_by[id(out)] = made_by
        return True

    def _root(self, group: int) -> int:
        while self.parent[group] != group:
            group = self.parent[group]
        return group

    def fix(self, tensor: Tensor) -> None:
        """Keep the channels of a tensor as they are."""
        seen = self.known.get(id(tensor))
        if seen is not None:
            self.all[self._root(seen[1])].fixed = True

    def groups(self) -> list[Channels]:
        """Those that are not part of another."""
        return [group for i, group in enumerate(self.all) if self.parent[i] == i]


def _weighted(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) and isinstance(module.weight, Tensor)


def _argument(args: Any, kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
