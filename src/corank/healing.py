"""Healing of whole directories: train a compressed model towards the dense one it was made from, and write the result."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from corank import checkpoint
from corank.api import check_target, compress, load
from corank.engine.world import started
from corank.errors import CorankError
from corank.evaluate.perplexity import adds_bos
from corank.heal.healing import Healed, Progress, require, train
from corank.heal.training import Schedule
from corank.jsonfile import read_json, write_json
from corank.model import ResidentModel, Source, StreamedModel, Text, calibration, read_text, resolve
from corank.order import Order
from corank.recipe import get
from corank.report import Report
from corank.report.card import write_card


def heal(
    model: str | Path | PreTrainedModel,
    teacher: str | Path | PreTrainedModel | None = None,
    how: str = "kd",
    *,
    out: str | Path | None = None,
    data: Source | Sequence[Source] = "builtin",
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
    require(how, what)
    schedule = schedule or Schedule()
    target = None if out is None else check_target(out)
    if target is None and not isinstance(model, PreTrainedModel):
        raise CorankError("Give out=DIRECTORY: a model that is read from disk is written to disk.")
    text = read_text(data)
    student, words = (model, tokenizer) if isinstance(model, PreTrainedModel) else load(model)
    if words is None:
        raise CorankError("Give tokenizer=..., which the training text needs.")
    dense, source = _teacher(model if teacher is None else teacher, named=teacher is not None), ResidentModel(student)
    _same_shape(source, dense)
    sequences = calibration(words, text, samples, length, schedule.seed, bos=adds_bos(words))
    work = None if target is None else target.with_name(target.name + ".healing")
    said = {"how": how, "what": what, "top": top, "schedule": dataclasses.asdict(schedule), "data": sequences.source}
    if work is not None:
        _claim(work, {**said, "model": str(model)})
    healed = train(source, dense, sequences, how, what=what, top=top, schedule=schedule, work=work, progress=progress)
    if target is not None:
        assert work is not None
        checkpoint.save(
            student, words, target, provenance=_provenance(student, healed, said), documents=_documents(model, healed)
        )
        shutil.rmtree(work, ignore_errors=True)
    return healed


def compress_and_heal(
    model: str | Path | PreTrainedModel, method: str, order: Order, *, out: str | Path | None, **rest: Any
) -> Report:
    """What `corank.compress` does if the recipe ends in training.

    The calibration text is learned from too. The closed form is written to ``<out>.unhealed`` first, from where an
    interrupted run goes on.

    Args:
        model, method, out, rest: as `corank.compress` has them.
        order: the same, checked.

    Raises:
        CorankError: the model is in memory, there is no text, or several processes run.
    """
    if out is None or isinstance(model, PreTrainedModel):
        raise CorankError(
            "heal=... needs a model on disk and out=DIRECTORY; in memory, compress first and call corank.heal.heal."
        )
    if not isinstance(order.text, Text):
        raise CorankError("heal=... learns from text; give text as calibration data.")
    if started() > 1:
        raise CorankError("Training runs in one process: compress with heal=none, then use `corank heal`.")
    target = check_target(out)
    stage = target.with_name(target.name + ".unhealed")
    note, claim = stage / "order.json", json.loads(json.dumps(order.identity()))
    if not (note.is_file() and read_json(note) == claim):
        if stage.exists():
            raise CorankError(f"{stage} is left from another run; delete it, or repeat that command.")
        compress(model, method, out=stage, **{**rest, "heal": "none"})
        write_json(note, claim)
    say = rest.get("progress") or (lambda layer, stage, error: None)
    layers = int(read_json(stage / "config.json").get("num_hidden_layers") or 1)
    healed = heal(
        stage,
        resolve(model),
        order.recipe.heal,
        out=target,
        data=order.text,
        samples=order.samples,
        length=order.length,
        schedule=Schedule(epochs=order.recipe.epochs, seed=order.seed),
        progress=lambda what, done, of, value: say(
            done * layers // max(of, 1), what, None if value != value else value
        ),
    )
    report = told(Report.load(stage / "report.json"), healed)
    report = dataclasses.replace(report, parameters={**report.parameters, "heal": order.recipe.heal})
    report.save(target / "report.json")
    write_card(report, target / "README.md", cite=get(report.method).cite)
    shutil.rmtree(stage, ignore_errors=True)
    return report


def told(report: Report, healed: Healed) -> Report:
    """The report of a model after healing: what was measured before holds no longer."""
    record = {k: v for k, v in healed.to_json().items() if k != "history"}
    healing = [*report.extra.get("healing", []), record]
    stages = {**report.stages, f"heal ({healed.how})": healed.seconds}
    return dataclasses.replace(
        report, evaluation={}, generation={}, speed=[], stages=stages, extra={**report.extra, "healing": healing}
    )


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


def _provenance(student: PreTrainedModel, healed: Healed, said: Mapping[str, Any]) -> dict[str, Any]:
    known = getattr(getattr(student.config, "quantization_config", None), "provenance", None) or {}
    record = {**said, **{k: v for k, v in healed.to_json().items() if k != "history"}}
    return {**known, "healing": [*known.get("healing", []), record]}


def _documents(model: str | Path | PreTrainedModel, healed: Healed) -> dict[str, str]:
    documents = {"healing.json": json.dumps(healed.to_json(), indent=2)}
    if not isinstance(model, PreTrainedModel):
        for name in ("report.json", "README.md", "recipe.yaml"):
            if (Path(model) / name).is_file():
                documents[name] = (Path(model) / name).read_text()
    return documents
