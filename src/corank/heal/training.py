"""One training loop for everything that heals: never ends worse on held-out sequences, goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corank.engine.world import ALONE, Interrupted, World
from corank.errors import CorankError, unknown

Report = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss on the held-out sequences)."""

RATE = 1.5e-5
"""Learning rate where neither the schedule nor the way to heal names one."""
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the training sequences.
        minutes: an end by the clock, None for none; the learning rate has then fallen as well.
        learning_rate: of AdamW, at its peak; it rises over the first tenth and falls to zero by a cosine. None: what the
            way to heal is known to work with.
        batch: sequences per forward pass.
        accumulate: forward passes per step. A step learns from batch * accumulate sequences, however many processes
            share them.
        clip: largest norm of the gradient of all parameters.
        checks: how often an epoch ends in a look at the held-out sequences, > 0.
        seed: of the order of the sequences.
        precision: of the products in training: "float32" (that of the weights), "bfloat16" (autocast; gradients, moments
            and the held-out loss stay in float32), or "auto": bfloat16 on a CUDA device that has it.

    Raises:
        CorankError: a value is out of range.
    """

    epochs: float = 2.0
    minutes: float | None = None
    learning_rate: float | None = None
    batch: int = 2
    accumulate: int = 1
    clip: float = 1.0
    checks: int = 2
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        if not (self.epochs >= 0 and math.isfinite(self.epochs)):
            raise CorankError(f"epochs={self.epochs} should be zero or more.")
        if self.minutes is not None and not self.minutes > 0:
            raise CorankError(f"minutes={self.minutes} should be more than zero.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise CorankError(f"learning_rate={self.learning_rate} should be more than zero.")
        if min(self.batch, self.accumulate, self.checks) < 1 or not self.clip > 0:
            raise CorankError("clip should be more than zero, batch, accumulate and checks at least one.")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)

    @property
    def each(self) -> int:
        """Sequences per step."""
        return self.batch * self.accumulate

    def steps(self, sequences: int) -> int:
        """Steps of training on so many sequences, without regard to the clock."""
        return round(self.epochs * -(-sequences // self.each))

    def rate(self, done: float) -> float:
        """Learning rate over its peak when a share `done` of the training is behind."""
        return min(1.0, (done + 1e-3) / 0.1) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


@dataclass(frozen=True)
class Control:
    """What a training does besides descending one loss; see `fit`.

    Attributes:
        rates: name of a parameter -> factor of its learning rate, where it is not 1; negative: the loss is ascended.
        before: called before each step with its number, from 0.
        after: called after each with its number and name -> parameter in float32 at least, its gradient in ``.grad``, which
            may be changed in place; True ends the training.
        judge: loss on held-out sequences, where it is not that of training.
        last: the last state is the result, whatever the held-out loss says, as long as that is finite.
        constant: the learning rate neither rises nor falls.
        state, restore: what else has to be kept to go on where training was interrupted, as `torch.save` takes it.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    before: Callable[[int], None] = lambda step: None
    after: Callable[[int, Mapping[str, Tensor]], bool] = lambda step, values: False
    judge: Callable[[Sequence[int]], Tensor] | None = None
    last: bool = False
    constant: bool = False
    state: Callable[[], dict[str, Any]] = dict
    restore: Callable[[Mapping[str, Any]], None] = lambda state: None


@dataclass
class History:
    """What happened: loss on the held-out sequences after so many steps; the first entry is before any.

    Attributes:
        steps: steps done at each look at the held-out sequences.
        heldout: loss found there.
        clock: seconds of training until then.
        seconds: of training in all.
        ended: why training ended early, "" if it did not.
        kept: loss of the state that is kept, where that is not the lowest one that was seen.
    """

    steps: list[int] = field(default_factory=list)
    heldout: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    seconds: float = 0.0
    ended: str = ""
    kept: float | None = None

    @property
    def best(self) -> float:
        """The held-out loss of the state that is kept: the lowest."""
        return self.kept if self.kept is not None else min(value for value in self.heldout if math.isfinite(value))

    def note(self, step: int, value: float) -> None:
        """Add a look at the held-out sequences, now."""
        self.steps.append(step)
        self.heldout.append(value)
        self.clock.append(self.seconds)

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
    weight: Callable[[Sequence[int]], float] = len,
    state: Path | None = None,
    report: Report = lambda done, of, value: None,
    world: World = ALONE,
    control: Control | None = None,
) -> History:
    """Minimise a loss by AdamW and keep the state that is best on held-out sequences.

    Gradients, moments and updates are in float32 for parameters of lower precision too; what is kept is rounded once.
    Several processes share the sequences of every step and add up their gradients: the result is that of one process up
    to the rounding of these sums.

    Args:
        parameters: name -> what is trained; nothing else changes.
        loss: indices of sequences -> mean loss over them.
        train, heldout: indices to learn from, and to judge by.
        schedule: how long.
        weight: indices of sequences -> how many things (sequences, tokens) the loss is a mean over.
        state: file to continue from and to keep the state in; None: not resumable.
        report: of progress.
        world: the processes that share the work; all of them call this function.
        control: what else happens; None: nothing.

    Returns:
        held-out losses; the last state is the best one, which is the untouched one if nothing was better.

    Raises:
        CorankError: the loss is not finite before any step.
        Interrupted: the disk is full; the state kept before is whole, and the parameters are the best ones so far.
    """
    masters = {n: p.detach().to(_wide(p), copy=True).requires_grad_() for n, p in parameters.items()}
    peak, control = schedule.learning_rate or RATE, control or Control()
    optimizer = torch.optim.AdamW(_groups(masters, control), lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    total = schedule.steps(len(train)) if parameters else 0
    each = max(1, -(-len(train) // schedule.each) // schedule.checks)
    history, best, step = History(), _clones(parameters), 0
    kept = None if state is None else world.from_first(lambda: _read(state))
    if kept is not None:
        step, history, best = _restore(kept, state, masters, optimizer)
        control.restore(kept.get("control", {}))
        _copy(masters, parameters)
    judge = _judge(control.judge or loss, heldout, weight, schedule.batch, world)
    if not history.heldout:
        history.note(0, judge())
        if not math.isfinite(history.heldout[0]):
            raise CorankError("The loss is not finite before training; check the model with `corank eval`.")
    before, started = history.seconds, time.perf_counter()
    report(step, total, history.heldout[-1])
    over = bool(history.ended) or bool(kept and kept.get("over"))
    for p in parameters.values():
        p.requires_grad_(True)
    try:
        while step < total and not over:
            done = step / total
            if schedule.minutes is not None:
                clock = (before + time.perf_counter() - started) / (60 * schedule.minutes)
                done = max(done, world.from_first(lambda clock=clock: clock))  # type: ignore[misc]
            for group in optimizer.param_groups:
                group["lr"] = peak * group.get("factor", 1.0) * (1.0 if control.constant else schedule.rate(done))
            control.before(step)
            value = _gradients(parameters, masters, loss, _pick(train, step, schedule), weight, schedule, world)
            norm = torch.nn.utils.clip_grad_norm_(
                [m for m in masters.values() if m.grad is not None], schedule.clip
            ).item()
            if not (math.isfinite(value) and math.isfinite(norm)):
                what = "loss" if not math.isfinite(value) else "gradient"
                history.ended = f"the {what} was not finite at step {step + 1} of {total}"
                best = _clones(parameters) if control.last else best
                break
            optimizer.step()
            over = control.after(step, masters) or done >= 1
            _copy(masters, parameters)
            step += 1
            history.seconds = before + time.perf_counter() - started
            if step % each == 0 or step == total or over:
                history.note(step, judge())
                if math.isfinite(history.heldout[-1]) and (control.last or history.heldout[-1] <= history.best):
                    best = _clones(parameters)
                    history.kept = history.heldout[-1] if control.last else None
                if not math.isfinite(history.heldout[-1]):
                    history.ended = f"the loss on held-out sequences was not finite after step {step} of {total}"
                    over = True
                if state is not None:
                    beside = {"control": control.state(), "over": over}
                    world.from_first(partial(_keep, state, step, history, best, masters, optimizer, beside))
            report(step, total, history.heldout[-1])
    finally:
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(best[n])
                p.grad = None
    history.seconds = before + time.perf_counter() - started
    return history


def _judge(
    loss: Callable[[Sequence[int]], Tensor],
    heldout: Sequence[int],
    weight: Callable[[Sequence[int]], float],
    size: int,
    world: World,
) -> Callable[[], float]:
    """The loss on the held-out sequences, each process having its share of the batches."""
    batches = [heldout[i : i + size] for i in range(0, len(heldout), size)]
    share = world.share(len(batches))

    def judge() -> float:
        with torch.no_grad():
            parts = [(float(loss(part)) * weight(part), weight(part)) for part in batches[share.start : share.stop]]
        every = [each for parts in world.gather(parts) for each in parts]
        return sum(value for value, _ in every) / (sum(count for _, count in every) or 1)

    return judge


def _gradients(
    parameters: Mapping[str, nn.Parameter],
    masters: Mapping[str, Tensor],
    loss: Callable[[Sequence[int]], Tensor],
    which: Sequence[int],
    weight: Callable[[Sequence[int]], float],
    schedule: Schedule,
    world: World,
) -> float:
    """The gradient of the mean loss over some sequences, into the masters; and that loss."""
    share, everything, total = world.share(len(which)), weight(which) or 1, 0.0
    mine = which[share.start : share.stop]
    with torch.enable_grad(), autocast(parameters, schedule.precision):
        for i in range(0, len(mine), schedule.batch):
            part = mine[i : i + schedule.batch]
            value = loss(part) * (weight(part) / everything)
            value.backward()
            total += value.item()
    used = {n for names in world.gather([n for n, p in parameters.items() if p.grad is not None]) for n in names}
    for n, p in parameters.items():
        masters[n].grad = None
        if n in used:
            masters[n].grad = torch.zeros_like(masters[n]) if p.grad is None else p.grad.to(masters[n].dtype)
        p.grad = None
    world.add(m.grad for m in masters.values() if m.grad is not None)
    return sum(world.gather(total))


@contextlib.contextmanager
def autocast(parameters: Mapping[str, nn.Parameter], precision: str) -> Iterator[None]:
    """Products in bfloat16 where that is asked for, see `Schedule`."""
    first = next(iter(parameters.values()))
    cuda = first.device.type == "cuda"
    wanted = precision == "bfloat16" or (precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    with torch.autocast(first.device.type, torch.bfloat16) if wanted else contextlib.nullcontext():
        yield


def _pick(train: Sequence[int], step: int, schedule: Schedule) -> list[int]:
    """The sequences of a step: every epoch in an order of its own, which depends on the seed alone."""
    per_epoch = -(-len(train) // schedule.each)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + epoch)
    order = torch.randperm(len(train), generator=generator).tolist()
    return [train[i] for i in order[place * schedule.each : (place + 1) * schedule.each]]


def _groups(masters: Mapping[str, Tensor], control: Control) -> list[dict[str, Any]]:
    """Parameters by the factor of their learning rate; one group without any."""
    factors = {n: control.rates.get(n, 1.0) for n in masters}
    return [
        {"params": [m for n, m in masters.items() if factors[n] == f], "factor": abs(f), "maximize": f < 0}
        for f in sorted({*factors.values()}) or [1.0]
    ]


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _clones(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in parameters.items()}


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
    beside: Mapping[str, Any],
) -> None:
    unfinished = state.with_name(state.name + ".partial")
    document = {
        "step": step,
        "history": history.to_json(),
        "best": dict(best),
        "masters": {n: m.detach() for n, m in masters.items()},
        "optimizer": optimizer.state_dict(),
        **beside,
    }
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        torch.save(document, unfinished)
        os.replace(unfinished, state)
    except (OSError, RuntimeError) as error:  # PyTorch reports a failed write as a RuntimeError
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise Interrupted(
            f"The state of the training could not be written to {state.parent}, most likely because the disk is full. Free "
            "some space and run the same command again: it goes on from the last state that was written, which is whole."
        ) from error


def _read(state: Path) -> dict[str, Any] | None:
    return torch.load(state, weights_only=True) if state.is_file() else None


def _restore(
    document: Mapping[str, Any], state: Path | None, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, History, dict[str, Tensor]]:
    if document["masters"].keys() != masters.keys():
        raise CorankError(f"{state} belongs to the training of other parameters; delete it to start again.")
    with torch.no_grad():
        for n, m in masters.items():
            m.copy_(document["masters"][n])
    optimizer.load_state_dict(document["optimizer"])
    return document["step"], History(**document["history"]), document["best"]
