"""Which blocks go: what a recipe that takes away blocks is told, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from corank.engine.gradients import next_token_loss
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.structured.recipe import Selection as Selection
from corank.structured.task import Task


@dataclass(frozen=True)
class Walk:
    """Hidden states of the calibration windows at every boundary between blocks, as far as they are kept.

    Attributes:
        changes: for each block, the mean over tokens of 1 - cos(x, y) of what enters and what leaves it.
        ends: for each boundary, from that before the first block on, the state at the last real token [windows, d].
        means: the same, averaged over the real tokens.
    """

    changes: list[float]
    ends: list[Tensor]
    means: list[Tensor]


class Depth:
    """What a function that chooses blocks is told. Everything is measured when it is first asked for.

    Attributes:
        layers: number of blocks.
        free: numbers of those that may go.
    """

    def __init__(self, task: Task):
        self.task = task
        self.layers = task.layers
        protected = task.recipe.protected(task.layers)
        self.free = [i for i in range(task.layers) if i not in protected]
        _check_possible(task, protected)

    def enough(self, removed: Iterable[int]) -> bool:
        """Whether what is left without these blocks fits the budget."""
        gone = set(removed)
        return sum(cost for i, cost in enumerate(self.task.costs) if i not in gone) <= self.task.limit

    @cached_property
    def walk(self) -> Walk:
        """One pass of the calibration data through the model.

        Raises:
            CorankError: activations are not finite (the block is named).
        """
        return walk(self.task)

    def losses_without(self, removed: Collection[int]) -> dict[int, float]:
        """Loss on the calibration text, in nats per token, if one more block went; by its number.

        All candidates are tried in one pass over the blocks, so that each is read once: the stream of a candidate parts
        from that of all when its block is passed over. Memory: the activations of the calibration data, for every candidate.

        Args:
            removed: blocks that are gone already.

        Raises:
            CorankError: the model does not predict the next token, or gives a loss that is not finite.
        """
        task, gone = self.task, set(removed)
        trunk = self._stream()
        branches: dict[int, Stream] = {}
        with torch.no_grad():
            for layer in (i for i in range(self.layers) if i not in gone):
                task.report(layer, f"without {len(gone) + 1} blocks", None)
                with task.source.block(layer) as block:
                    started = {layer: trunk.copy()} if layer in self.free else {}
                    for stream in [trunk, *branches.values()]:
                        stream.hidden = [stream.run(block, layer, i) for i in range(len(stream))]
                branches |= started
            with task.source.outside(head=True):
                return {layer: self._loss(stream, layer) for layer, stream in branches.items()}

    @cached_property
    def _entering(self) -> Stream:
        assert self.task.data is not None, "the recipe names no statistics"
        return Stream(self.task.source, self.task.data, self.task.batch)

    def _stream(self) -> Stream:
        return self._entering.copy()

    def _loss(self, stream: Stream, layer: int) -> float:
        total, count = 0.0, 0
        for i, ids in enumerate(stream.ids):
            mask = stream.mask(i)
            mask = None if mask is None else mask.bool()
            logits = self.task.source.logits(ids, mask, stream.hidden[i])
            total += float(next_token_loss(logits, ids.to(logits.device), mask, causal=True))
            count += ids[:, 1:].numel() if mask is None else int(mask[:, 1:].sum())
        if not count or not self.task.source.model.can_generate():
            raise CorankError(
                "This method judges blocks by how well the model predicts the next token of a text, which this model or "
                "these data do not have; use one that looks at activations, such as shortgpt."
            )
        if not math.isfinite(total):
            raise CorankError(f"The loss without block {layer} is not finite; check the model and the data.")
        return total / count


def _check_possible(task: Task, protected: set[int]) -> None:
    """At least one block has to stay, and what is protected."""
    costs = task.costs
    least = sum(costs[i] for i in protected) if protected else min(costs)
    if least <= task.limit:
        return
    rest = task.source.outline.parameters - sum(costs) if task.whole else 0
    every = sum(costs) + rest
    what = f"the protected {'block' if len(protected) == 1 else 'blocks'}" if protected else "a single block"
    raise CorankError(
        f"The budget ({task.budget.describe()}) leaves less than {what}, which is {(least + rest) / every:.1%} of the "
        f"{task.budget.scope}; give at least keep={math.ceil((least + rest) / every * 1000) / 1000:g}."
    )


def turned(x: Tensor, y: Tensor) -> Tensor:
    """``1 - cos(x, y)`` over the last axis, in float64; 0 of two zero vectors, 1 of one."""
    x, y = x.double(), y.double()
    tiny = torch.finfo(torch.float64).tiny
    x = x / x.abs().amax(-1, keepdim=True).clamp_min(tiny)
    y = y / y.abs().amax(-1, keepdim=True).clamp_min(tiny)
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp_min(tiny)
    both = (x == 0).all(-1) & (y == 0).all(-1)
    return (1 - cosine.clamp(-1, 1)).masked_fill(both, 0.0)


def walk(task: Task) -> Walk:
    """Run the calibration data through the model, block by block.

    The first token of a window is left out of `changes`: it is where models park what they do not need, at a magnitude that
    hides what happens to it.

    Raises:
        CorankError: activations are not finite.
    """
    assert task.data is not None, "the recipe names no statistics"
    changes, ends, means = [], [], []
    stream = Stream(task.source, task.data, task.batch)
    masks = [_real(stream, i) for i in range(len(stream))]

    def note() -> None:
        ends.append(torch.cat([_last(x, mask) for x, mask in zip(stream.hidden, masks, strict=True)]))
        means.append(torch.cat([_mean(x, mask) for x, mask in zip(stream.hidden, masks, strict=True)]))

    note()
    with torch.no_grad():
        for layer in range(task.layers):
            task.report(layer, "measure", None)
            total, count = 0.0, 0
            with task.source.block(layer) as block:
                for i in range(len(stream)):
                    after = stream.run(block, layer, i)
                    counted = masks[i].clone()
                    if counted.shape[1] > 1:
                        counted[:, 0] = False
                    total += float(turned(stream.hidden[i], after)[counted].sum())
                    count += int(counted.sum())
                    stream.hidden[i] = after
            if not math.isfinite(total) or not all(torch.isfinite(x).all() for x in stream.hidden):
                raise CorankError(
                    f"Block {layer} gives activations that are not finite; use a wider dtype, or check the model."
                )
            changes.append(total / max(count, 1))
            note()
    return Walk(changes, ends, means)


def _real(stream: Stream, i: int) -> Tensor:
    """[batch, tokens], True at real tokens of batch i."""
    mask, hidden = stream.mask(i), stream.hidden[i]
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()


def _last(x: Tensor, mask: Tensor) -> Tensor:
    """The state at the last real token of each window, float64 [windows, d], on the CPU."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).amax(1).clamp_min(0)
    return x[torch.arange(len(x), device=x.device), last.to(x.device)].double().cpu()


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(x.device).double().unsqueeze(-1)
    return ((x.double() * weight).sum(1) / weight.sum(1).clamp_min(1)).cpu()
