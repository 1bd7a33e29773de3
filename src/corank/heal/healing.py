"""Win back by training what compression lost: one interface for every way of doing it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from corank import checkpoint
from corank.api import check_target, load
from corank.errors import CorankError, unknown
from corank.evaluate.perplexity import adds_bos
from corank.factors import FactorizedLinear
from corank.heal.blocks import refine_blocks
from corank.heal.distillation import predictions
from corank.heal.training import Schedule, divide, fit
from corank.jsonfile import read_json, write_json
from corank.model import ResidentModel, StreamedModel, Text, calibration, read_text, resolve

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


def heal(
    model: str | Path | PreTrainedModel,
    teacher: str | Path | PreTrainedModel | None = None,
    how: str = "kd",
    *,
    out: str | Path | None = None,
    data: str | Path | Text = "builtin",
    samples: int = 64,
    length: int = 512,
    what: str = "blocks",
    top: int = 256,
    schedule: Schedule | None = None,
    tokenizer: Any = None,
    progress: Progress = lambda what, done, of, value: None,
) -> Healed:
    """Train a compressed model towards the dense one.

    A tenth of the sequences is held out; the state that is best there is the result, the untouched one included.

    Args:
        model: a compressed directory, or a model in memory, which is changed in place.
        teacher: the dense model, None: the one the directory says it was made from.
        how: a key of `HOW`.
        out: directory to write; None for a model in memory.
        data: text to learn from, as in `corank.compress`.
        samples, length: sequences, and tokens in each.
        what: what is trained: "factors", the factorized matrices with the norms and biases of their blocks, or "blocks",
            everything in the blocks. Embeddings and head are not.
        top: tokens of the teacher's predictions that are kept (`kd`).
        schedule: how long and how fast; None: the default one.
        tokenizer: of a model in memory.
        progress: of training.

    Raises:
        CorankError: bad input; nothing has been written. An interrupted run keeps ``<out>.healing`` and goes on from there.
    """
    if how not in HOW:
        raise unknown("way to heal", how, HOW)
    if what not in WHAT:
        raise unknown("choice of what to train", what, WHAT)
    schedule = schedule or Schedule()
    target = None if out is None else check_target(out)
    if target is None and not isinstance(model, PreTrainedModel):
        raise CorankError("Give out=DIRECTORY: a model that is read from disk is written to disk.")
    text = data if isinstance(data, Text) else read_text(data)
    student, words = (model, tokenizer) if isinstance(model, PreTrainedModel) else load(model)
    if words is None:
        raise CorankError("Give tokenizer=..., which the training text needs.")
    dense = _teacher(model if teacher is None else teacher, named=teacher is not None)
    sequences = calibration(words, text, samples, length, schedule.seed, bos=adds_bos(words))
    train, heldout = divide(samples)
    source = ResidentModel(student)
    _same_shape(source, dense)
    work = None if target is None else target.with_name(target.name + ".healing")
    if work is not None:
        claim = {
            "how": how,
            "what": what,
            "top": top,
            "schedule": str(schedule),
            "text": sequences.source,
            "model": str(model),
        }
        _claim(work, claim)
    flags = [(p, p.requires_grad) for p in student.parameters()]
    student.requires_grad_(False)
    try:
        if how == "block":
            histories = refine_blocks(
                source,
                dense,
                sequences,
                lambda block, path: trainable(block, what),
                train,
                heldout,
                schedule,
                state=work,
                report=lambda done, of, value: progress("blocks", done, of, value),
            )
        else:
            taught = predictions(
                dense, sequences, top, report=lambda done, of: progress("teacher", done, of, float("nan"))
            )
            parameters = {
                f"{source.outline.path(i)}.{n}": p
                for i in range(source.outline.layers)
                for n, p in trainable(student.get_submodule(source.outline.path(i)), what).items()
            }

            def loss(which: Any) -> Any:
                ids = sequences.ids[which].to(source.device)
                mask = None if sequences.mask is None else sequences.mask[which].to(source.device)
                logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits
                return taught.divergence(logits, list(which))

            histories = [
                fit(
                    parameters,
                    loss,
                    train,
                    heldout,
                    schedule,
                    state=None if work is None else work / "kd.pt",
                    report=lambda done, of, value: progress("distillation", done, of, value),
                )
            ]
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    trained = sum(
        p.numel()
        for i in range(source.outline.layers)
        for p in trainable(student.get_submodule(source.outline.path(i)), what).values()
    )
    healed = Healed(
        how,
        before=sum(h.heldout[0] for h in histories) / len(histories),
        after=sum(h.best for h in histories) / len(histories),
        trained=trained,
        history=[h.to_json() for h in histories],
        seconds=sum(h.seconds for h in histories),
    )
    if target is not None:
        assert work is not None
        checkpoint.save(
            student, words, target, provenance=_provenance(student, healed), documents=_documents(model, healed)
        )
        shutil.rmtree(work, ignore_errors=True)
    return healed


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


def _teacher(given: str | Path | PreTrainedModel, named: bool) -> ResidentModel:
    if isinstance(given, PreTrainedModel):
        if not named:
            raise CorankError("Give teacher=..., the dense model, to learn from.")
        return ResidentModel(given)
    path = Path(given)
    if not named:
        report = path / "report.json"
        found = read_json(report).get("model") if report.is_file() else None
        if not found:
            raise CorankError(f"{path} does not say which dense model it was made from; give it (--teacher).")
        path = Path(found)
    return StreamedModel(resolve(str(path)))


def _same_shape(student: ResidentModel, teacher: ResidentModel) -> None:
    a, b = student.config.get_text_config(), teacher.config.get_text_config()
    alike = a.model_type == b.model_type and student.outline.layers == teacher.outline.layers
    if not alike or (a.vocab_size, a.hidden_size) != (b.vocab_size, b.hidden_size):
        raise CorankError(
            "The teacher has another architecture, other layers or another vocabulary than the model; give the dense model it was made from."
        )


def _claim(work: Path, claim: Mapping[str, Any]) -> None:
    file = work / "healing.json"
    if work.exists() and not file.is_file():
        raise CorankError(
            f"{work} is in the way and does not belong to this run; delete it, or choose another directory."
        )
    if file.is_file() and read_json(file) != dict(claim):
        raise CorankError(f"{work} belongs to a run with other settings; delete it, or repeat that command.")
    work.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(claim))


def _provenance(student: PreTrainedModel, healed: Healed) -> dict[str, Any]:
    known = getattr(getattr(student.config, "quantization_config", None), "provenance", None) or {}
    record = {k: v for k, v in healed.to_json().items() if k != "history"}
    return {**known, "healing": [*known.get("healing", []), record]}


def _documents(model: str | Path | PreTrainedModel, healed: Healed) -> dict[str, str]:
    documents = {"healing.json": json.dumps(healed.to_json(), indent=2)}
    if not isinstance(model, PreTrainedModel):
        for name in ("report.json", "README.md", "recipe.yaml"):
            if (Path(model) / name).is_file():
                documents[name] = (Path(model) / name).read_text()
    return documents
