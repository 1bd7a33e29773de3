"""The dense and the compressed model side by side, a block at a time: what every local way to heal is built on.

Two streams of activations go through the blocks: h of the dense model, and h' of the model compressed and healed up to
the block before. Local: one block of weights of each model in memory, no gradient through the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corank.engine.stream import Stream
from corank.factors import ExpertList, FactorizedLinear, shape_of
from corank.heal.parameters import of_block
from corank.heal.training import History
from corank.heal.way import Case

Seen = dict[str, tuple[Tensor, Tensor, Tensor | None]]
"""Path inside the block -> input in the dense model, input in the compressed one, mask of the rows that count."""


@dataclass(frozen=True)
class Visit:
    """One block of both models.

    Attributes:
        case: what is healed; its minutes are those of this block.
        layer: number of the block.
        dense, block: the block of the dense and of the compressed model.
        goal, seen: their streams, in front of the block, a sequence per batch.
        after: what the dense block makes of its stream.
        scale: mean square of that.
    """

    case: Case
    layer: int
    dense: nn.Module
    block: nn.Module
    goal: Stream
    seen: Stream
    after: list[Tensor]
    scale: float

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What may change in the block, by its name there."""
        return of_block(self.case.student.model, self.case.student.outline.path(self.layer), self.case.what)

    def state(self) -> Path | None:
        """File to keep the state of this block's training in."""
        return self.case.state(f"block-{self.layer}.pt")

    def error(self, which: Sequence[int]) -> Tensor:
        """Mean over sequences of || f(h) - f'(h') ||^2, relative to the mean square of f(h) in all of them."""
        # residual streams have a few huge values at a few tokens; relative to the mean square they are one scale for all
        parts = [squared(self.after[i] - self.seen.run(self.block, self.layer, i), self.goal.mask(i)) for i in which]
        return torch.stack(parts).mean() / max(self.scale, 1e-30)

    def inputs(self, i: int, paths: Sequence[str]) -> Seen:
        """What some matrices of the block read in both models, in sequence i; nothing is differentiated.

        The compressed model's experts are given the tokens that the dense model's router gives them, so that the rows of
        both belong together.
        """
        first = _observed(self.goal, self.dense, self.layer, i, paths)
        with routed_alike(self.block, self.dense):
            second = _observed(self.seen, self.block, self.layer, i, paths)
        return {path: (first[path][0], *second[path]) for path in paths if path in first and path in second}


def by_blocks(case: Case, heal: Callable[[Visit], History]) -> list[History]:
    """Heal block after block, each from the inputs that it will really see.

    Args:
        case: the model; minutes are those of all blocks together.
        heal: changes a block in place and says what happened.
    """
    layers = case.teacher.outline.layers
    minutes = case.schedule.minutes
    of_one = case.schedule if minutes is None else replace(case.schedule, minutes=minutes / layers)
    case = replace(case, schedule=of_one)
    # one sequence per batch, so that a step can take any of them
    goal, seen = Stream(case.teacher, case.data, 1), Stream(case.student, case.data, 1)
    histories = []
    for layer in range(layers):
        with case.teacher.block(layer) as dense, case.student.block(layer) as block:
            with torch.no_grad():
                after = [goal.run(dense, layer, i) for i in range(len(goal))]
            scale = sum(float(squared(h, goal.mask(i))) for i, h in enumerate(after)) / len(after)
            history = heal(Visit(case, layer, dense, block, goal, seen, after, scale))
            goal.set_hidden(layer, after)
            with torch.no_grad():
                seen.set_hidden(layer, [seen.run(block, layer, i) for i in range(len(seen))])
        histories.append(history)
        case.progress("blocks", layer + 1, layers, history.best)
    return histories


def parameters_by_blocks(case: Case) -> dict[str, nn.Parameter]:
    """What may change when blocks are healed one by one."""
    plan, model = case.student.outline, case.student.model
    paths = [plan.path(i) for i in range(plan.layers)]
    return {f"{path}.{n}" if path else n: p for path in paths for n, p in of_block(model, path, case.what).items()}


def matrices(block: nn.Module, dense: nn.Module) -> list[str]:
    """Paths of the factorized linear layers of a block that are as large as in the dense one, in the order of its modules."""
    every = ((n, m) for n, m in block.named_modules() if isinstance(m, FactorizedLinear))
    linear = [(n, m) for n, m in every if getattr(m, "form", None) is None]
    return [n for n, m in linear if shape_of(m) == shape_of(dense.get_submodule(n))]


def squared(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean square over the real rows of x [..., d]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.pow(2).mean() if mask is None else x[mask].pow(2).mean()


@contextlib.contextmanager
def routed_alike(block: nn.Module, original: nn.Module) -> Iterator[None]:
    """Route the tokens in `block` as they were routed in `original` when it was observed last."""
    pairs = [(m, original.get_submodule(path)) for path, m in block.named_modules() if isinstance(m, ExpertList)]
    try:
        for mixture, other in pairs:
            mixture.forced = getattr(other, "index", None)
        yield
    finally:
        for mixture, _ in pairs:
            mixture.forced = None


def _observed(
    stream: Stream, block: nn.Module, layer: int, i: int, paths: Sequence[str]
) -> Mapping[str, tuple[Tensor, Tensor | None]]:
    found: dict[str, tuple[Tensor, Tensor | None]] = {}

    def note(path: str) -> Any:
        return lambda x, mask: found.__setitem__(path, (x, mask))

    stream.observe(block, layer, i, {path: note(path) for path in paths}, stop=True)
    return found
