"""One training loop for everything that heals: never ends worse on held-out sequences, goes on where it was interrupted."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError

Report = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss on the held-out sequences)."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the training sequences.
        minutes: an end by the clock, None for none; the learning rate has then fallen as well.
        learning_rate: of AdamW, at its peak; it rises over the first tenth and falls to zero by a cosine.
        batch: sequences per step.
        clip: largest norm of the gradient of all parameters.
        checks: how often an epoch ends in a look at the held-out sequences, > 0.
        seed: of the order of the sequences.

    Raises:
        CorankError: a value is out of range.
    """

    epochs: float = 2.0
    minutes: float | None = None
    learning_rate: float = 1.5e-5
    batch: int = 2
    clip: float = 1.0
    checks: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.epochs >= 0 and math.isfinite(self.epochs)):
            raise CorankError(f"epochs={self.epochs} should be zero or more.")
        if self.minutes is not None and not self.minutes > 0:
            raise CorankError(f"minutes={self.minutes} should be more than zero.")
        if not self.learning_rate > 0 or self.batch < 1 or not self.clip > 0 or self.checks < 1:
            raise CorankError("learning_rate and clip should be more than zero, batch and checks at least one.")

    def steps(self, sequences: int) -> int:
        """Steps of training on so many sequences, without regard to the clock."""
        return round(self.epochs * -(-sequences // self.batch))

    def rate(self, done: float) -> float:
        """Learning rate over its peak when a share `done` of the training is behind."""
        return min(1.0, (done + 1e-3) / 0.1) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


@dataclass
class History:
    """What happened: loss on the held-out sequences after so many steps; the first entry is before any."""

    steps: list[int] = field(default_factory=list)
    heldout: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def best(self) -> float:
        """The lowest held-out loss, that of the state which is kept."""
        return min(self.heldout)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def divide(sequences: int, share: float = 0.1) -> tuple[list[int], list[int]]:
    """Indices of the sequences to train on, and of those held out: evenly spaced, at least one of each.

    Raises:
        CorankError: there are fewer than two.
    """
    if sequences < 2:
        raise CorankError("Training needs at least two sequences: one to learn from and one to judge by.")
    count = min(max(round(share * sequences), 1), sequences - 1)
    held = {(2 * i + 1) * sequences // (2 * count) for i in range(count)}
    return [i for i in range(sequences) if i not in held], sorted(held)


def fit(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[Sequence[int]], Tensor],
    train: Sequence[int],
    heldout: Sequence[int],
    schedule: Schedule,
    *,
    state: Path | None = None,
    report: Report = lambda done, of, value: None,
) -> History:
    """Minimise a loss by AdamW and keep the state that is best on held-out sequences.

    Gradients, moments and updates are in float32 for parameters of lower precision too; what is kept is rounded once.

    Args:
        parameters: name -> what is trained; nothing else changes.
        loss: indices of sequences -> mean loss over them.
        train, heldout: indices to learn from, and to judge by.
        schedule: how long.
        state: file to continue from and to keep the state in; None: not resumable.
        report: of progress.

    Returns:
        held-out losses; the last state is the best one, which is the untouched one if nothing was better.

    Raises:
        CorankError: the loss is not finite before any step.
    """
    masters = {n: p.detach().float().clone().requires_grad_() for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    total = schedule.steps(len(train)) if parameters else 0
    each = max(1, -(-len(train) // schedule.batch) // schedule.checks)
    history, best, step = History(), {n: p.detach().clone() for n, p in parameters.items()}, 0
    if state is not None and state.is_file():
        step, history, best = _restore(state, masters, optimizer)
        _copy(masters, parameters)

    def judge() -> float:
        with torch.no_grad():
            size = schedule.batch
            parts = [heldout[i : i + size] for i in range(0, len(heldout), size)]
            return sum(float(loss(part)) * len(part) for part in parts) / len(heldout)

    if not history.heldout:
        history.heldout.append(judge())
        history.steps.append(0)
        if not math.isfinite(history.heldout[0]):
            raise CorankError("The loss is not finite before training; check the model with `corank eval`.")
    before, started = history.seconds, time.perf_counter()
    report(step, total, history.heldout[-1])
    over = False
    for p in parameters.values():
        p.requires_grad_(True)
    while step < total and not over:
        done = step / total
        if schedule.minutes is not None:
            done = max(done, (before + time.perf_counter() - started) / (60 * schedule.minutes))
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.rate(done)
        with torch.enable_grad():
            value = loss(_pick(train, step, schedule))
            value.backward()
        for n, p in parameters.items():
            masters[n].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_([m for m in masters.values() if m.grad is not None], schedule.clip)
        optimizer.step()
        _copy(masters, parameters)
        step += 1
        history.seconds = before + time.perf_counter() - started
        over = done >= 1 or not math.isfinite(value.item())
        if step % each == 0 or step == total or over:
            history.heldout.append(judge())
            history.steps.append(step)
            if history.heldout[-1] <= history.best:
                best = {n: p.detach().clone() for n, p in parameters.items()}
            if state is not None:
                _keep(state, step, history, best, masters, optimizer)
        report(step, total, history.heldout[-1])
    with torch.no_grad():
        for n, p in parameters.items():
            p.copy_(best[n])
            p.grad = None
    history.seconds = before + time.perf_counter() - started
    return history


def _pick(train: Sequence[int], step: int, schedule: Schedule) -> list[int]:
    """The sequences of a step: every epoch in an order of its own, which depends on the seed alone."""
    per_epoch = -(-len(train) // schedule.batch)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + epoch)
    order = torch.randperm(len(train), generator=generator).tolist()
    return [train[i] for i in order[place * schedule.batch : (place + 1) * schedule.batch]]


def _copy(masters: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for n, p in parameters.items():
            p.copy_(masters[n])


def _keep(
    state: Path,
    step: int,
    history: History,
    best: Mapping[str, Tensor],
    masters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    partial = state.with_name(state.name + ".partial")
    document = {
        "step": step,
        "history": history.to_json(),
        "best": dict(best),
        "masters": {n: m.detach() for n, m in masters.items()},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(document, partial)
    os.replace(partial, state)


def _restore(
    state: Path, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, History, dict[str, Tensor]]:
    document = torch.load(state, weights_only=True)
    if document["masters"].keys() != masters.keys():
        raise CorankError(f"{state} belongs to the training of other parameters; delete it to start again.")
    with torch.no_grad():
        for n, m in masters.items():
            m.copy_(document["masters"][n])
    optimizer.load_state_dict(document["optimizer"])
    return document["step"], History(**document["history"]), document["best"]
