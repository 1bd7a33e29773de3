"""A model in memory as a sequence of blocks.

Blocks are run through the model's own forward: they are replaced for a moment by recorders, so that masks and
position embeddings are what the model itself would pass, for every architecture, without copying a line of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corank.factors import put_together, take_apart
from corank.model.outline import Outline, outline

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Everything a block is called with besides the hidden state."""

Batch = Mapping[str, Any]
"""Inputs of a model by name, as its forward takes them."""


class _Stop(Exception):
    """Ends a forward pass once everything wanted from it has been seen."""


@dataclass(frozen=True)
class Inputs:
    """What the first block sees, and what every block is called with.

    Attributes:
        hidden: [batch, tokens, d]; a placeholder if the model runs as a whole.
        calls: one entry per block.
    """

    hidden: Tensor
    calls: list[Call]


class ResidentModel:
    """Blocks of a model that is in memory. The model is changed in place by whoever replaces layers in a block.

    Besides its blocks, numbered from 0, a model has one more part, numbered `outline.layers`: what lies around the
    blocks. A model that cannot be streamed is a single block, itself.

    Args:
        model: it is put into evaluation mode.
        plan: its outline; default: found by a run on the meta device.
        example: model inputs of the shapes that will come, for that run.
    """

    def __init__(self, model: PreTrainedModel, plan: Outline | None = None, example: Batch | None = None):
        self.model = model.eval()
        self.config: PretrainedConfig = model.config
        self.outline = plan or outline(model.config, type(model), example)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype

    def _block(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.outline.path(layer))

    @contextlib.contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """The block with its weights in memory, and with its experts as modules of their own."""
        if layer == self.outline.layers:
            with self.outside(head=True):
                yield self.model
            return
        block = self._block(layer)
        take_apart(block)
        try:
            yield block
        finally:
            put_together(block)

    @contextlib.contextmanager
    def outside(self, head: bool) -> Iterator[None]:
        """Make the modules around the blocks usable (`head`: the output embedding too)."""
        yield

    @contextlib.contextmanager
    def _replaced(self, forward: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        """Run `forward(layer, hidden, call)` instead of the blocks' own forward."""

        def replacement(layer: int) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if args:
                    hidden, args = args[0], args[1:]
                else:
                    hidden = kwargs.pop("hidden_states")
                result = forward(layer, hidden, (args, kwargs))
                return (result,) if self.outline.returns_tuple else result

            return run

        blocks = [self._block(i) for i in range(self.outline.layers)]
        try:
            for i, block in enumerate(blocks):
                block.forward = replacement(i)  # type: ignore[method-assign]
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def complete(self, batch: Batch) -> dict[str, Any]:
        """A batch as the model is called with it.

        An encoder-decoder model that is given text alone reads the first half of each window and continues with the
        second. Numbers take the dtype of the weights.
        """
        batch = dict(batch)
        if self.config.is_encoder_decoder and "input_ids" in batch and not {"decoder_input_ids", "labels"} & set(batch):
            batch = _halves(batch, self.config)
        for name, value in batch.items():
            if isinstance(value, Tensor):
                dtype = self.dtype if value.is_floating_point() else value.dtype
                batch[name] = value.to(self.device, torch.long if value.dtype == torch.bool else dtype)
        if self.model.can_generate():
            batch.setdefault("use_cache", False)
        return batch

    def inputs(self, batch: Batch | Tensor, mask: Tensor | None = None) -> Inputs:
        """Hidden state before the first block and the arguments of every block.

        Call it inside ``with self.outside(head=False)``.

        Args:
            batch: model inputs, or ids [batch, tokens].
            mask: [batch, tokens], True for real tokens, beside ids.
        """
        inputs = self.complete(_as_batch(batch, mask))
        if self.outline.whole:
            return Inputs(torch.zeros(()), [((), inputs)])
        seen: list[Tensor] = []
        calls: list[Call] = []

        def record(layer: int, hidden: Tensor, call: Call) -> Tensor:
            if layer == 0:
                seen.append(hidden)
            calls.append(call)
            if layer == self.outline.layers - 1:
                raise _Stop
            return hidden

        with self._replaced(record), torch.no_grad(), contextlib.suppress(_Stop):
            self.model(**inputs)
        return Inputs(seen[0].detach(), calls)

    def around(self, batch: Batch, hidden: Tensor) -> Any:
        """The model's output with `hidden` in place of what its last block returns; differentiable in `hidden`.

        Call it inside ``with self.outside(head=True)``.
        """
        last = self.outline.layers - 1
        with self._replaced(lambda layer, h, _call: hidden if layer == last else h):
            return self.model(**self.complete(batch))

    def logits(self, ids: Tensor, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] from the last block's output; differentiable in `hidden`.

        Call it inside ``with self.outside(head=True)``.
        """
        return self.around(_as_batch(ids, mask), hidden).logits

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """Output of a block for hidden [batch, tokens, d].

        A model that runs as a whole gives the largest magnitude in its output in place of a hidden state.
        """
        args, kwargs = call
        if self.outline.whole:
            return _peak(block(**kwargs))
        result = block(hidden, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result


def _as_batch(batch: Batch | Tensor, mask: Tensor | None) -> Batch:
    if not isinstance(batch, Tensor):
        return batch
    return {"input_ids": batch} if mask is None else {"input_ids": batch, "attention_mask": mask}


def _halves(batch: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The first half of each window for the encoder, the second, one place to the right, for the decoder."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    half = ids.shape[1] // 2
    start = torch.full_like(ids[:, :1], config.decoder_start_token_id or 0)
    made = {**batch, "input_ids": ids[:, :half], "decoder_input_ids": torch.cat([start, ids[:, half:-1]], dim=1)}
    if mask is not None:
        made["attention_mask"] = mask[:, :half]
        made["decoder_attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]), mask[:, half:-1]], dim=1)
    return made


def _peak(output: Any) -> Tensor:
    values = output.values() if isinstance(output, Mapping) else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point()).detach().abs().amax()
