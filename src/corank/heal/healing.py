"""Every way of bringing a compressed model back towards the dense one, behind one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from corank.engine.world import ALONE, World
from corank.errors import CorankError
from corank.heal.training import History, Schedule, divide
from corank.heal.way import Case, Progress, Way, way, what_of
from corank.model import Calibration, ResidentModel


@dataclass(frozen=True)
class Healed:
    """What healing did.

    Attributes:
        how: the way.
        what: what was trained.
        measure: what the loss is, for people.
        before, after: loss on the held-out sequences; of ways that go block by block the mean over the blocks of what each
            had before and after its own training.
        trained: number of parameters, or of those of the adapters.
        curve: pairs (seconds, loss on the held-out sequences) until then, the one before any training first.
        history: held-out losses, of every part of the training.
        seconds: of training.
        notes: sentences for the reader: where training ended early.
    """

    how: str
    what: str
    measure: str
    before: float
    after: float
    trained: int
    curve: list[list[float]]
    history: list[dict[str, Any]]
    seconds: float
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(self.__dict__)


def train(
    student: ResidentModel,
    teacher: ResidentModel,
    data: Calibration,
    how: str = "kd",
    *,
    what: str | None = None,
    top: int = 256,
    schedule: Schedule | None = None,
    work: Path | None = None,
    progress: Progress = lambda what, done, of, value: None,
    world: World = ALONE,
) -> Healed:
    """Heal a compressed model in memory, in place.

    A tenth of the sequences is held out; the state that is best there is the result, the untouched one included.

    Args:
        student: the compressed model.
        teacher: the dense one, resident or streamed.
        data: sequences to learn from.
        how: name of a way, see `corank.heal.ways`.
        what: what is trained, one of the choices the way allows (`corank.heal.WHAT`); None: its own.
        top: tokens of the teacher's predictions that are kept.
        schedule: how long and how fast; None: the default one.
        work: directory to continue from, None: not resumable.
        progress: of training.
        world: the processes that share the work; all of them call this function.

    Raises:
        CorankError: an unknown `how` or `what`, a teacher of other shapes, nothing to train, or fewer than two sequences.
    """
    chosen, what = way(how), what_of(how, what)
    schedule = schedule or Schedule()
    if schedule.learning_rate is None:
        schedule = replace(schedule, learning_rate=chosen.learning_rate)
    learned, heldout = divide(len(data.ids))
    require_alike(student, teacher, chosen.local)
    if any(hasattr(part.weight, "qdata") for part in student.model.modules() if isinstance(part, nn.Linear)):
        raise CorankError("The factors are quantized; heal the model as it was before, and quantize the result.")
    case = Case(student, teacher, data, learned, heldout, what, schedule, top, work, progress, world)
    count = sum(p.numel() for p in chosen.parameters(case).values())
    if not count:
        raise CorankError(f"This model has nothing that {how} trains ({chosen.summary}); choose another way (how=...).")
    count = count if chosen.trained is None else chosen.trained(case)
    both = (student.model, teacher.model)
    flags = [(p, p.requires_grad) for model in both for p in model.parameters()]
    for model in both:
        model.requires_grad_(False)
    try:
        histories = chosen.run(case)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return _told(how, what, chosen, histories, count)


def require_alike(student: ResidentModel, teacher: ResidentModel, local: bool) -> None:
    """Check that a teacher can teach a model.

    Args:
        student, teacher: the models.
        local: blocks are compared with blocks.

    Raises:
        CorankError: they have other tokens; or, for local ways, other layers.
    """
    mine, other = student.config.get_text_config(), teacher.config.get_text_config()
    if mine.vocab_size != other.vocab_size:
        raise CorankError(
            f"The model knows {mine.vocab_size} tokens and the teacher {other.vocab_size}: they have different vocabularies; "
            "give the dense model it was made from."
        )
    if not local:
        return
    if student.outline.whole:
        raise CorankError("This model does not run block by block, so that nothing local can heal it; use how=kd.")
    shape = [(c.model_type, c.hidden_size, m.outline.layers) for c, m in ((mine, student), (other, teacher))]
    if shape[0] != shape[1]:
        raise CorankError(
            "The teacher has another architecture, other layers or another width than the model, and this way compares block "
            "with block; use how=kd, which needs the same vocabulary alone, or give the dense model it was made from."
        )


def _told(how: str, what: str, chosen: Way, histories: Sequence[History], count: int) -> Healed:
    join: Callable[..., Any] = _curve_of_blocks if chosen.by_blocks else _curve_of_parts
    if chosen.by_blocks:
        before = sum(h.heldout[0] for h in histories) / len(histories)
        after = sum(h.best for h in histories) / len(histories)
        places = [f"block {i}" for i in range(len(histories))]
    else:
        before, after = histories[0].heldout[0], histories[-1].best
        places = [f"part {i + 1}" if len(histories) > 1 else "training" for i in range(len(histories))]
    return Healed(
        how,
        what,
        chosen.measure,
        before=before,
        after=after,
        trained=count,
        curve=join(histories),
        history=[h.to_json() for h in histories],
        seconds=sum(h.seconds for h in histories),
        notes=[
            f"{place}: {h.ended}; the best state until then was kept."
            for place, h in zip(places, histories, strict=True)
            if h.ended
        ],
    )


def _curve_of_parts(histories: Sequence[History]) -> list[list[float]]:
    """Loss against seconds of trainings that follow each other on the same loss."""
    points, start = [], 0.0
    for history in histories:
        points += [[start + s, v] for s, v in zip(history.clock, history.heldout, strict=True)]
        start += history.seconds
    return points


def _curve_of_blocks(histories: Sequence[History]) -> list[list[float]]:
    """Mean loss over the blocks against seconds; those not healed yet count as they were."""
    now = [h.heldout[0] for h in histories]
    points, seconds = [[0.0, sum(now) / len(now)]], 0.0
    for i, history in enumerate(histories):
        now[i], seconds = history.best, seconds + history.seconds
        points.append([seconds, sum(now) / len(now)])
    return points
