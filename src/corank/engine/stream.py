"""Activations of the calibration data at one block boundary, and running a block on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corank.engine.world import ALONE, World
from corank.errors import CorankError
from corank.factors import ExpertList
from corank.model import Calibration, ResidentModel
from corank.model.resident import Call

Observer = Callable[[Tensor, Tensor | None], None]
"""Takes the input [batch, tokens, n] of a module and the mask [batch, tokens] of real tokens (or None)."""


class _Stop(Exception):
    """Nothing more is wanted from this forward pass."""


class Stream:
    """Hidden states of the calibration sequences, in batches, and what every block is called with.

    Args:
        source: the model.
        data: the calibration windows.
        batch: sequences per forward pass.
        world: the processes that share the batches; each has a run of them, whole batches, so that every one is computed
            as a single process would.

    Attributes:
        batches: those of this process.
        numbers: which ones they are, among those of all processes.
        total: batches of all processes.

    Raises:
        CorankError: there are more processes than batches.
    """

    def __init__(self, source: ResidentModel, data: Calibration, batch: int, world: World = ALONE):
        self.source = source
        every = data.batches(batch)
        if len(every) < world.size:
            found = f"{len(every)} batch{'es' * (len(every) > 1)}"
            enough = len(data.ids) >= world.size
            smaller = f", or smaller batches (--batch {len(data.ids) // world.size})" if enough else ""
            raise CorankError(
                f"{found} of calibration data cannot be shared by {world.size} processes; start at most {len(every)}, or "
                f"give more data{smaller}."
            )
        self.numbers, self.total = world.share(len(every)), len(every)
        self.batches = every[self.numbers.start : self.numbers.stop]
        self.ids = [b["input_ids"] for b in self.batches if "input_ids" in b]
        complete = [source.complete(b) for b in self.batches]
        self.masks = [_mask(b, "attention_mask") for b in complete]
        self._target_masks = [_mask(b, "decoder_attention_mask") for b in complete]
        plan = source.outline
        self._of_decoder = {plan.local(s) for s in (*plan.sites, *plan.optional) if s.decoder}
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call]] = []
        same: dict[int, list[Call]] = {}  # without padding, batches of one size are mostly called alike
        with source.outside(head=False):
            for inputs in map(source.inputs, self.batches):
                known = same.setdefault(len(inputs.hidden) if inputs.hidden.dim() else -1, inputs.calls)
                self.hidden.append(inputs.hidden)
                self._calls.append(known if _alike(known, inputs.calls) else inputs.calls)

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
        """Output of a block on batch i (or on `hidden` in place of its activations).

        What lies around the blocks is run with the activations in place of the last block's output, and gives them back.
        """
        hidden = self.hidden[i] if hidden is None else hidden
        if layer == self.source.outline.layers:
            self.source.around(self.batches[i], hidden)
            return hidden
        return self.source.run(block, hidden, self._calls[i][layer])

    def observe(
        self,
        block: nn.Module,
        layer: int,
        i: int,
        observers: Mapping[str, Observer],
        stop: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor | None:
        """Run a block on batch i (or on `hidden` in its place) and show the inputs of some of its modules.

        Args:
            observers: path inside the block -> called with that module's input.
            stop: end the forward pass once the last of them has been seen; the result is None then.
        """
        left = set(observers)
        mixtures = [module for module in block.modules() if isinstance(module, ExpertList)]
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for path, observer in observers.items():
                show = self._show(block, path, observer, i, left, stop)
                hooks.enter_context(_input_hook(block.get_submodule(path), show))
            for mixture in mixtures:
                hooks.enter_context(mixture.noted())
            try:
                return self.run(block, layer, i, hidden)
            except _Stop:
                return None

    def _show(
        self, block: nn.Module, path: str, observer: Observer, i: int, left: set[str], stop: bool
    ) -> Callable[[Tensor], None]:
        def show(x: Tensor) -> None:
            observer(x.detach(), self._mask_of(block, path, i, x))
            left.discard(path)
            if stop and not left:
                raise _Stop

        return show

    def _mask_of(self, block: nn.Module, path: str, i: int, x: Tensor) -> Tensor | None:
        """Mask of the real rows of a module's input, None if all are: a row per token, or those routed to an expert."""
        mask = self._target_masks[i] if path in self._of_decoder else self.masks[i]
        if mask is None:
            return None
        container, _, number = path.rpartition(".")[0].rpartition(".")
        mixture = block.get_submodule(container) if number.isdigit() else None
        if isinstance(mixture, ExpertList):
            assert mixture.routes is not None
            return mask.flatten()[mixture.routes[int(number)]]
        return mask.reshape(x.shape[:-1]) if mask.numel() == x.shape[:-1].numel() else None

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


def _mask(batch: Mapping[str, Any], name: str) -> Tensor | None:
    mask = batch.get(name)
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _alike(a: Any, b: Any) -> bool:
    """Whether two sets of arguments are the same, tensors by value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


@contextlib.contextmanager
def _input_hook(module: nn.Module, show: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        show(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
