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
from corank.api import check_target, compress, load, load_tokenizer
from corank.checkpoint.widths import only_narrow
from corank.engine.world import device_of, joined, started
from corank.errors import CorankError
from corank.evaluate.perplexity import adds_bos
from corank.heal.healing import Healed, require_alike, train
from corank.heal.overlap import TESTS, separate
from corank.heal.training import Schedule
from corank.heal.way import Progress, way, what_of
from corank.jsonfile import read_json, write_json
from corank.model import ResidentModel, Source, StreamedModel, Text, calibration, read_text, resolve
from corank.model.streaming import NotStreamable
from corank.order import Order
from corank.recipe import Recipe, get
from corank.report import Report
from corank.report.card import write_card

CLAIM = "healing.json"
"""File that says which run a working directory belongs to."""


def heal(
    model: str | Path | PreTrainedModel,
    teacher: str | Path | PreTrainedModel | None = None,
    how: str = "kd",
    *,
    out: str | Path | None = None,
    data: Source | Sequence[Source] = "builtin",
    samples: int = 64,
    length: int = 512,
    what: str | None = None,
    top: int = 256,
    schedule: Schedule | None = None,
    tokenizer: Any = None,
    tests: Sequence[Source] = TESTS,
    device: str = "cpu",
    progress: Progress = lambda what, done, of, value: None,
) -> Healed:
    """Train a compressed model towards the dense one.

    A tenth of the sequences is held out; the state that is best there is the result, the untouched one included.

    Args:
        model: a compressed directory, or a model in memory, which is changed in place. With `how="kd"` also a plain model
            that was made smaller in another way.
        teacher: the dense model, None: the one the directory says it was made from.
        how: name of a way, see `corank.heal.ways`.
        out: directory to write; None for a model in memory.
        data: text to learn from, as in `corank.compress`.
        samples, length: sequences, and tokens in each.
        what: what is trained, one of the choices the way allows (`corank.heal.WHAT`); None: its own.
        top: tokens of the teacher's predictions that are kept.
        schedule: how long and how fast; None: the default one.
        tokenizer: of a model in memory.
        tests: texts that the result will be tested with; they must not be among those it learns from.
        device: where to compute, for a model that is read from disk.
        progress: of training.

    In an initialised process group of `torch.distributed` all processes make the same call and share every step; the one of
    rank 0 writes. The result is that of a single process up to rounding.

    Raises:
        CorankError: bad input; nothing has been written. An interrupted run keeps ``<out>.healing`` and goes on from there.
    """
    what = what_of(how, what)
    schedule = schedule or Schedule()
    if schedule.learning_rate is None:
        schedule = dataclasses.replace(schedule, learning_rate=way(how).learning_rate)
    target = None if out is None else check_target(out)
    if target is None and not isinstance(model, PreTrainedModel):
        raise CorankError("Give out=DIRECTORY: a model that is read from disk is written to disk.")
    text = separate(read_text(data), [read_text(each) for each in tests])
    with joined() as world:
        where = device_of(device, world)
        student, words = (model, tokenizer) if isinstance(model, PreTrainedModel) else load(model, device=where)
        if words is None:
            raise CorankError("Give tokenizer=..., which the training text needs.")
        source, dense = (
            ResidentModel(student),
            _teacher(model if teacher is None else teacher, teacher is not None, where),
        )
        require_alike(source, dense, way(how).local)
        _same_words(words, dense, text)
        sequences = calibration(words, text, samples, length, schedule.seed, bos=adds_bos(words))
        work = None if target is None else target.with_name(target.name + ".healing")
        said = {
            "how": how,
            "what": what,
            "top": top,
            "schedule": dataclasses.asdict(schedule),
            "data": sequences.source,
        }
        if work is not None:
            world.from_first(lambda: _claim(work, {**said, "model": str(model)}))
        report = progress if world.first else (lambda what, done, of, value: None)
        try:
            healed = train(
                source,
                dense,
                sequences,
                how,
                what=what,
                top=top,
                schedule=schedule,
                work=work,
                progress=report,
                world=world,
            )
        except CorankError:
            if work is not None and world.first and [file.name for file in work.iterdir()] == [CLAIM]:
                shutil.rmtree(work, ignore_errors=True)  # nothing to go on with
            raise
        if target is not None:
            world.from_first(lambda: _write(model, student, words, target, healed, said))
    return healed


def _write(
    model: str | Path | PreTrainedModel,
    student: PreTrainedModel,
    words: Any,
    target: Path,
    healed: Healed,
    said: Mapping[str, Any],
) -> None:
    checkpoint.save(
        student, words, target, provenance=_provenance(student, healed, said), documents=_documents(model, healed)
    )
    shutil.rmtree(target.with_name(target.name + ".healing"), ignore_errors=True)


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
            "heal=... needs a model on disk and out=DIRECTORY; in memory, compress first, then call corank.heal."
        )
    if not isinstance(order.text, Text):
        raise CorankError("heal=... learns from text; give text as calibration data.")
    if started() > 1:
        raise CorankError("Training runs in one process: compress with heal=none, then use `corank heal`.")
    assert isinstance(order.recipe, Recipe)  # others end in no training
    separate(order.text, [read_text(each) for each in TESTS])  # before anything is made
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
        device=str(rest.get("device") or "cpu"),
        out=target,
        data=order.text,
        samples=order.samples,
        length=order.length,
        schedule=Schedule(epochs=order.recipe.epochs, minutes=order.recipe.minutes, seed=order.seed),
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


def _teacher(given: str | Path | PreTrainedModel, named: bool, device: str) -> ResidentModel:
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
    found_at = resolve(str(path))
    section = read_json(found_at / "config.json").get("quantization_config")
    if section and not only_narrow(section):
        raise CorankError(f"The teacher {path} is compressed or quantized itself; give the dense model (--teacher).")
    try:
        return StreamedModel(found_at, device)
    except NotStreamable:
        return ResidentModel(checkpoint.load(found_at, device=device)[0])


def _same_words(words: Any, teacher: ResidentModel, text: Text) -> None:
    """Refuse a teacher that reads text in other tokens, as far as it says what it reads."""
    if not isinstance(teacher, StreamedModel):
        return
    try:
        other = load_tokenizer(teacher.path)
    except CorankError:
        return
    piece = text.text[:2000]
    mine, theirs = (t(piece, add_special_tokens=False)["input_ids"] for t in (words, other))
    if mine != theirs or words.get_vocab() != other.get_vocab():
        raise CorankError(
            f"The model and the teacher {teacher.path} have different tokenizers, so that their predictions cannot be "
            "compared; give the dense model it was made from (--teacher)."
        )


def _claim(work: Path, claim: Mapping[str, Any]) -> None:
    file = work / CLAIM
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
