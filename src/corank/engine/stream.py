"""Activations of the calibration data at one block boundary, and running a block on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.model import Calibration, ResidentModel
from corank.model.streaming import Call

Observer = Callable[[Tensor, Tensor | None], None]
"""Takes the input [batch, tokens, n] of a module and the mask [batch, tokens] of real tokens (or None)."""


class _Stop(Exception):
    """Nothing more is wanted from this forward pass."""


class Stream:
    """Hidden states of all calibration sequences, in batches, and what every block is called with.

    Args:
        source: the model.
        data: the calibration windows.
        batch: sequences per forward pass.
    """

    def __init__(self, source: ResidentModel, data: Calibration, batch: int):
        self.source = source
        starts = range(0, len(data.ids), batch)
        self.ids = [data.ids[i : i + batch] for i in starts]
        self.masks = [None if data.mask is None else data.mask[i : i + batch].bool() for i in starts]
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call]] = []
        same: dict[int, list[Call]] = {}  # without padding, batches of one size are called alike
        with source.outside(head=False):
            for ids, mask in zip(self.ids, self.masks, strict=True):
                inputs = source.inputs(ids, mask)
                self.hidden.append(inputs.hidden)
                self._calls.append(inputs.calls if mask is not None else same.setdefault(len(ids), inputs.calls))

    def __len__(self) -> int:
        return len(self.hidden)

    def copy(self) -> Stream:
        """A second stream that starts from the same activations."""
        other = object.__new__(Stream)
        other.__dict__.update(self.__dict__)
        other.hidden = list(self.hidden)
        return other

    def mask(self, i: int) -> Tensor | None:
        """Mask of real tokens of batch i."""
        return self.masks[i]

    def run(self, block: nn.Module, layer: int, i: int, hidden: Tensor | None = None) -> Tensor:
        """Output of a block on batch i (or on `hidden` in place of its activations)."""
        return self.source.run(block, self.hidden[i] if hidden is None else hidden, self._calls[i][layer])

    def observe(
        self, block: nn.Module, layer: int, i: int, observers: Mapping[str, Observer], stop: bool = False
    ) -> Tensor | None:
        """Run a block on batch i and show the inputs of some of its modules.

        Args:
            observers: path inside the block -> called with that module's input.
            stop: end the forward pass once the last of them has been seen; the result is None then.
        """
        left = set(observers)
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for path, observer in observers.items():
                hooks.enter_context(_input_hook(block.get_submodule(path), self._show(path, observer, i, left, stop)))
            try:
                return self.run(block, layer, i)
            except _Stop:
                return None

    def _show(self, path: str, observer: Observer, i: int, left: set[str], stop: bool) -> Callable[[Tensor], None]:
        def show(x: Tensor) -> None:
            observer(x.detach(), self.mask(i))
            left.discard(path)
            if stop and not left:
                raise _Stop

        return show

    def set_hidden(self, layer: int, hidden: list[Tensor]) -> None:
        """Replace the activations by those behind block `layer`.

        Raises:
            CorankError: some are not finite; the layer is named.
        """
        for h in hidden:
            if not torch.isfinite(h).all():
                raise CorankError(
                    f"The activations behind layer {layer} are not finite; the weights of that layer are damaged, or "
                    f"the computation overflows in {str(h.dtype).removeprefix('torch.')} (try --dtype float32)."
                )
        self.hidden = hidden


@contextlib.contextmanager
def _input_hook(module: nn.Module, show: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        show(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
