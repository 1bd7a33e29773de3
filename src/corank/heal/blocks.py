"""Block refinement: every block learns the dense block's output from the inputs that it will really see.

    min over the block's factors, norms and biases of  || f_l(h) - f'_l(h') ||^2 / || f_l(h) ||^2

with h the dense model's hidden state and h' that of the model compressed and refined up to block l - 1. Local: one
block of weights and two streams of activations in memory, no gradient through the whole model. As in the block-wise
stage of SVD-LLM's successors (L2) and BRECQ, arXiv:2102.05426.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from corank.engine.stream import Stream
from corank.heal.training import History, Schedule, fit
from corank.model import Calibration, ResidentModel


def refine_blocks(
    student: ResidentModel,
    teacher: ResidentModel,
    data: Calibration,
    parameters_of: Callable[[nn.Module, str], Mapping[str, nn.Parameter]],
    train: Sequence[int],
    heldout: Sequence[int],
    schedule: Schedule,
    *,
    state: Path | None = None,
    report: Callable[[int, int, float], None] = lambda done, of, value: None,
) -> list[History]:
    """Refine block by block, from the first to the last.

    Args:
        student: the compressed model in memory, changed in place.
        teacher: the dense model, resident or streamed.
        data: the sequences.
        parameters_of: (block, its path) -> what is trained in it.
        train, heldout: indices of sequences to learn from, and to judge by.
        schedule: for each block; minutes are those of all blocks together.
        state: directory to continue from.
        report: called with (blocks done, blocks, relative squared error of the last one on the held-out sequences).

    Returns:
        what happened in each block.
    """
    layers = teacher.outline.layers
    if schedule.minutes is not None:
        schedule = replace(schedule, minutes=schedule.minutes / layers)
    # one sequence per batch, so that a step can take any of them
    goal, seen = Stream(teacher, data, 1), Stream(student, data, 1)
    histories = []
    for layer in range(layers):
        with teacher.block(layer) as dense, torch.no_grad():
            goal.set_hidden(layer, [goal.run(dense, layer, i) for i in range(len(goal))])
        with student.block(layer) as block:
            history = _refine(block, layer, goal, seen, parameters_of, train, heldout, schedule, student, state)
            with torch.no_grad():
                seen.set_hidden(layer, [seen.run(block, layer, i) for i in range(len(seen))])
        histories.append(history)
        report(layer + 1, layers, history.best)
    return histories


def _refine(
    block: nn.Module,
    layer: int,
    goal: Stream,
    seen: Stream,
    parameters_of: Callable[[nn.Module, str], Mapping[str, nn.Parameter]],
    train: Sequence[int],
    heldout: Sequence[int],
    schedule: Schedule,
    student: ResidentModel,
    state: Path | None,
) -> History:
    masks = [goal.mask(i) for i in range(len(goal))]
    # residual streams have a few huge values at a few tokens; relative to the mean square they are one scale for all blocks
    scale = sum(float(_squared(h, m)) for h, m in zip(goal.hidden, masks, strict=True)) / len(masks)

    def loss(which: Sequence[int]) -> Tensor:
        parts = [_squared(goal.hidden[i] - seen.run(block, layer, i), masks[i]) for i in which]
        return torch.stack(parts).mean() / max(scale, 1e-30)

    parameters = parameters_of(block, student.outline.path(layer))
    file = None if state is None else state / f"block-{layer}.pt"
    return fit(parameters, loss, train, heldout, schedule, state=file)


def _squared(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean square over the real tokens of x [1, tokens, d]."""
    return x.float().pow(2).mean() if mask is None else x.float()[mask].pow(2).mean()
