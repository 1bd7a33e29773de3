"""Every way of training a compressed model towards the dense one, behind one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from corank.errors import unknown
from corank.factors import FactorizedLinear
from corank.heal.blocks import refine_blocks
from corank.heal.distillation import predictions
from corank.heal.training import History, Schedule, divide, fit
from corank.model import Calibration, ResidentModel

HOW = {
    "block": "every block learns the dense block's output from the inputs it will really see; local",
    "kd": "the whole model learns the dense model's distribution of the next token",
}
WHAT = ("factors", "blocks")
Progress = Callable[[str, int, int, float], None]
"""Called with (what, done, of, loss on held-out sequences)."""


@dataclass(frozen=True)
class Healed:
    """What training did.

    Attributes:
        how: the way.
        before, after: loss on the held-out sequences; of "block" the mean over the blocks of the relative squared error
            each had before and after its own training, of "kd" the divergence in nats per token.
        trained: number of parameters.
        history: held-out losses, of every block if they were trained one by one.
        seconds: of training.
    """

    how: str
    before: float
    after: float
    trained: int
    history: list[dict[str, Any]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(self.__dict__)


def train(
    student: ResidentModel,
    teacher: ResidentModel,
    data: Calibration,
    how: str = "kd",
    *,
    what: str = "blocks",
    top: int = 256,
    schedule: Schedule | None = None,
    work: Path | None = None,
    progress: Progress = lambda what, done, of, value: None,
) -> Healed:
    """Train a compressed model in memory towards the dense one, in place.

    A tenth of the sequences is held out; the state that is best there is the result, the untouched one included.

    Args:
        student: the compressed model.
        teacher: the dense one, resident or streamed.
        data: sequences to learn from.
        how: a key of `HOW`.
        what: what is trained: "factors", the factorized matrices with the norms and biases of their blocks, or "blocks",
            everything in the blocks. Embeddings and head are not.
        top: tokens of the teacher's predictions that are kept (`kd`).
        schedule: how long and how fast; None: the default one.
        work: directory to continue from, None: not resumable.
        progress: of training.

    Raises:
        CorankError: an unknown `how` or `what`, or fewer than two sequences.
    """
    require(how, what)
    schedule = schedule or Schedule()
    learned, heldout = divide(len(data.ids))
    blocks = [student.outline.path(i) for i in range(student.outline.layers)]
    flags = [(p, p.requires_grad) for p in student.model.parameters()]
    student.model.requires_grad_(False)
    try:
        if how == "block":
            histories = refine_blocks(
                student,
                teacher,
                data,
                lambda block, path: trainable(block, what),
                learned,
                heldout,
                schedule,
                state=work,
                report=lambda done, of, value: progress("blocks", done, of, value),
            )
        else:
            parameters = {
                f"{path}.{n}": p
                for path in blocks
                for n, p in trainable(student.model.get_submodule(path), what).items()
            }
            histories = [_distil(student, teacher, data, parameters, learned, heldout, top, schedule, work, progress)]
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return Healed(
        how,
        before=sum(h.heldout[0] for h in histories) / len(histories),
        after=sum(h.best for h in histories) / len(histories),
        trained=sum(p.numel() for path in blocks for p in trainable(student.model.get_submodule(path), what).values()),
        history=[h.to_json() for h in histories],
        seconds=sum(h.seconds for h in histories),
    )


def _distil(
    student: ResidentModel,
    teacher: ResidentModel,
    data: Calibration,
    parameters: dict[str, nn.Parameter],
    learned: Sequence[int],
    heldout: Sequence[int],
    top: int,
    schedule: Schedule,
    work: Path | None,
    progress: Progress,
) -> History:
    taught = predictions(teacher, data, top, report=lambda done, of: progress("teacher", done, of, float("nan")))

    def loss(which: Sequence[int]) -> Any:
        ids = data.ids[list(which)].to(student.device)
        mask = None if data.mask is None else data.mask[list(which)].to(student.device)
        logits = student.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return taught.divergence(logits, list(which))

    return fit(
        parameters,
        loss,
        learned,
        heldout,
        schedule,
        state=None if work is None else work / "kd.pt",
        report=lambda done, of, value: progress("distillation", done, of, value),
    )


def require(how: str, what: str) -> None:
    """Check the two choices.

    Raises:
        CorankError: one is unknown; the nearest names are suggested.
    """
    if how not in HOW:
        raise unknown("way to heal", how, HOW)
    if what not in WHAT:
        raise unknown("choice of what to train", what, WHAT)


def trainable(block: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """Parameters of a block that are trained: name -> parameter; see `heal`."""
    inside = {n for n, m in block.named_modules() if isinstance(m, FactorizedLinear)}
    chosen = {}
    for name, p in block.named_parameters():
        owner = name.rpartition(".")[0]
        factor = any(owner == n or owner.startswith(n + ".") for n in inside)
        if p.is_floating_point() and (what == "blocks" or factor or p.dim() == 1):
            chosen[name] = p
    return chosen
