"""One loop for all gates: that of `corank.heal`, with noise, a penalty, and something to be done after each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from corank.gates.gate import Gates
from corank.heal.distillation import Predictions
from corank.heal.training import Control, History, Schedule, divide, fit
from corank.model import Calibration, ResidentModel

Progress = Callable[[int, int, float, float], None]
"""Called with (steps done, steps in all, loss on held-out sequences, size with the gates that are open / size with all)."""


class Companion(Protocol):
    """Something that goes along with a training, and is kept with its state.

    What it depends on besides `step` has to be in its state, so that an interrupted training goes on as if it had not been.
    """

    def before(self, step: int) -> None:
        """Called before a step, numbered from 0."""
        ...

    def after(self, step: int, values: Mapping[str, Tensor]) -> bool:
        """Called after a step; True ends the training.

        Args:
            step: its number, from 0.
            values: name -> what trains, in float32 at least, with its mean gradient in ``.grad`` (after clipping; None if
                there was none); may be changed in place.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Tensors, numbers, strings, and lists and dicts of them."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        ...


def steps(count: int, sequences: int, **rest: Any) -> Schedule:
    """The schedule of so many steps.

    Args:
        count: steps.
        sequences: in the data, the held-out ones included.
        rest: other fields of `corank.heal.training.Schedule`: learning_rate, batch (default 1), accumulate, seed, clip, ...
    """
    learned = len(divide(sequences)[0])
    made = Schedule(**{"batch": 1, "epochs": 1.0, **rest})
    return Schedule(**{**made.__dict__, "epochs": count / -(-learned // made.each)})


def language_loss(source: ResidentModel, data: Calibration, which: Sequence[int]) -> Tensor:
    """Mean negative log-likelihood of the next token over some sequences, in nats.

    Args:
        source: a causal language model.
        data: sequences.
        which: indices of them.
    """
    rows = list(which)
    batch: dict[str, Any] = {"input_ids": data.ids[rows]}
    if data.mask is not None:
        batch["attention_mask"] = data.mask[rows]
    logits = source.model(**source.complete(batch)).logits[:, :-1]
    aims = data.ids[rows, 1:].to(logits.device)
    if data.mask is not None:
        aims = aims.masked_fill(~data.mask[rows, 1:].to(logits.device).bool(), -100)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits.flatten(0, 1), aims.flatten().long())


def train(
    source: ResidentModel,
    gates: Gates,
    data: Calibration,
    schedule: Schedule,
    *,
    penalty: Callable[[int], Tensor] | None = None,
    beside: Mapping[str, nn.Parameter] | None = None,
    rates: Mapping[str, float] | None = None,
    taught: Predictions | None = None,
    loss: Callable[[Sequence[int]], Tensor] | None = None,
    companions: Sequence[Companion] = (),
    constant: bool = True,
    state: Path | None = None,
    report: Progress = lambda done, of, value, size: None,
) -> History:
    """Train gates, and what is given beside them, inside ``with gates.attached(source.model)``.

    Minimised is the data term plus the penalty. Nothing but the gates and `beside` changes; the last state is the result.
    A tenth of the sequences is held out: on it the data term is measured without noise and without penalty, for the eye.

    Args:
        source: the model, in memory.
        gates: attached to it by the caller, who also takes them off.
        data: sequences (examples without text need `loss`).
        schedule: how long (see `steps`); learning_rate is that of the gates, batch * accumulate the sequences of a step.
        penalty: step -> scalar, differentiable in gates or in `beside`.
        beside: name -> other parameters that train: LoRA, multipliers. Names must not begin with "gate.".
        rates: name, or beginning of names -> factor of the learning rate, where it is not 1; negative: gradient ascent.
        taught: a teacher's predictions (`corank.heal.distillation.predictions`): the data term is the divergence from them;
            None: it is the language-model loss.
        loss: indices of sequences -> data term, in place of both.
        companions: asked before and after every step, in order.
        constant: the learning rate stays as it is; False: it rises and falls as in healing.
        state: file to continue from and to keep the state in.
        report: of progress.

    Returns:
        held-out losses; `ended` says why it ended early (a loss that was not finite: the gates are then those before it).

    Raises:
        CorankError: the loss is not finite before any step, or fewer than two sequences.
    """
    learned, heldout = divide(len(data.ids))
    parameters: dict[str, nn.Parameter] = {**gates.parameters(), **(beside or {})}

    def term(which: Sequence[int]) -> Tensor:
        if loss is not None:
            return loss(which)
        if taught is None:
            return language_loss(source, data, which)
        rows = list(which)
        batch: dict[str, Any] = {"input_ids": data.ids[rows]}
        if data.mask is not None:
            batch["attention_mask"] = data.mask[rows]
        return taught.divergence(source.model(**source.complete(batch)).logits, rows)

    now = 0

    def total(which: Sequence[int]) -> Tensor:
        value = term(which)
        return value if penalty is None else value + penalty(now).to(value)

    def judge(which: Sequence[int]) -> Tensor:
        with gates.quiet():
            return term(which)

    def before(step: int) -> None:
        nonlocal now
        now = step
        gates.draw(schedule.seed, step)
        for companion in companions:
            companion.before(step)

    def after(step: int, values: Mapping[str, Tensor]) -> bool:
        ends = [companion.after(step, values) for companion in companions]
        return any(ends)

    def restore(kept: Mapping[str, Any]) -> None:
        for companion, each in zip(companions, kept["companions"], strict=True):
            companion.restore(each)

    control = Control(
        rates=_rates(parameters, rates or {}),
        before=before,
        after=after,
        judge=judge,
        last=True,
        constant=constant,
        state=lambda: {"companions": [companion.state() for companion in companions]},
        restore=restore,
    )

    def tell(done: int, of: int, value: float) -> None:
        report(done, of, value, gates.ratio())

    flags = [(p, p.requires_grad) for p in source.model.parameters()]
    source.model.requires_grad_(False)
    try:
        return fit(parameters, total, learned, heldout, schedule, state=state, report=tell, control=control)
    finally:
        gates.noise = None
        for p, flag in flags:
            p.requires_grad_(flag)


def _rates(parameters: Mapping[str, nn.Parameter], given: Mapping[str, float]) -> dict[str, float]:
    """Factor of every parameter: that of the longest beginning of its name."""
    found = {}
    for name in parameters:
        fitting = [key for key in given if name.startswith(key)]
        if fitting:
            found[name] = given[max(fitting, key=len)]
    return found
