"""Tasks of the Language Model Evaluation Harness (lm-eval), through its Python API.

The harness does the measuring and its JSON is kept as it writes it, so that leaderboards and other tools can
read it. What is added here:

* The model is handed over as an object, so a compressed one is scored like any other.
* The BOS policy is explicit and the same as for perplexity: a BOS token iff the tokenizer itself adds one
  (Gemma without it scores like noise). It is written into lm-eval's JSON under ``config.model_args``.
* Task data may be local. A folder of ordinary lm-eval task files is enough, with no network at all; relative
  paths in their ``data_files`` are relative to that folder.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from corank.errors import CorankError, unknown
from corank.evaluate.perplexity import adds_bos


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: name of the task or group.
        metric, filter: e.g. ``acc``, ``none``.
        value: the metric, in lm-eval's unit.
        stderr: its standard error as lm-eval gives it; None where it gives none.
        higher_is_better: None if the task does not say.
        samples: documents evaluated.
        shots: examples in the prompt.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int
    shots: int | None


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """Scores, and what is needed to measure them again.

    Attributes:
        scores: in lm-eval's order.
        bos: whether texts began with the BOS token.
        limit: documents per task (a fraction below 1), None for all.
        file: lm-eval's own JSON, if it was asked for.
        version: of lm-eval.
        seconds: wall-clock time, loading the task data included.
    """

    scores: tuple[Score, ...]
    bos: bool
    limit: float | None
    file: Path | None
    version: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict. Numbers may be non-finite: write it with ``corank.jsonfile``."""
        return dataclasses.asdict(self) | {"file": None if self.file is None else str(self.file)}


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    name: str = "",
    tasks_dir: str | Path | None = None,
    limit: float | None = None,
    shots: int | None = None,
    chat: bool = False,
    bos: bool | Literal["auto"] = "auto",
    batch_size: int = 8,
    bootstrap: int = 1000,
    results: str | Path | None = None,
    quiet: bool = False,
) -> TaskResults:
    """Score a model on lm-eval tasks.

    Args:
        model: a transformers model that generates, dense or compressed.
        tokenizer: its tokenizer; it is not changed.
        tasks: names of tasks, groups or tags, or globs of them.
        name: what to call the model in lm-eval's JSON.
        tasks_dir: folder of lm-eval task files (``.yaml``), searched first. If it holds all that is asked for, the
            tasks that come with lm-eval are not even indexed, which takes a while.
        limit: only the first so many documents of each task, or this fraction of them if below 1.
        shots: examples in the prompt; None takes each task's own number.
        chat: put prompts through the tokenizer's chat template.
        bos: begin texts with the BOS token. ``"auto"``: iff the tokenizer itself adds one.
        batch_size: sequences per forward pass.
        bootstrap: resamples for standard errors that have no closed form (perplexities); 0 leaves those out.
        results: file for lm-eval's own JSON, untouched; it must not exist.
        quiet: silence lm-eval's progress bars and remarks.

    Returns:
        A :class:`TaskResults`.

    Raises:
        CorankError: lm-eval is not installed, no such task, its data cannot be had, the file exists, a BOS token asked
            for that the tokenizer does not add, or a meaningless number.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise CorankError("Scoring on tasks needs an optional package: pip install 'corank[eval]'.")
    names = [task.strip() for task in tasks if task.strip()]
    if not names:
        raise CorankError("Name at least one task, e.g. --tasks arc_easy,piqa.")
    if limit is not None and limit <= 0:
        raise CorankError(f"limit={limit} is not possible; give a number of documents, or a fraction below 1.")
    if limit is not None and limit >= 1 and limit != int(limit):
        raise CorankError(f"limit={limit} is neither a whole number of documents nor a fraction below 1.")
    if batch_size < 1 or bootstrap < 0 or (shots is not None and shots < 0):
        raise CorankError("Give a batch size of 1 or more, and no negative number of shots or resamples.")
    target = None if results is None else Path(results).expanduser().resolve()
    if target is not None and target.exists():
        raise CorankError(f"{target} exists already; give another file for the results.")
    folder = None if tasks_dir is None else Path(tasks_dir).expanduser().resolve()
    if folder is not None and not folder.is_dir():
        raise CorankError(f"There is no folder {folder} with task files.")
    ask = getattr(model, "can_generate", None)
    if not callable(ask) or not ask():
        raise CorankError(f"{type(model).__name__} is not a language model that generates; lm-eval cannot score it.")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise CorankError("This tokenizer has no chat template; give chat=False.")
    with_bos = adds_bos(tokenizer) if bos == "auto" else bool(bos)
    if with_bos and not adds_bos(tokenizer):
        raise CorankError("bos=True, but this tokenizer adds no BOS token; give bos=False or bos='auto'.")

    if target is not None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CorankError(f"Cannot write {target}: {error.strerror}.") from None

    started = time.perf_counter()
    was_training = model.training
    with _calm(quiet):
        raw = _evaluate(
            model,
            copy.deepcopy(tokenizer),  # lm-eval may give it a padding token
            names,
            folder,
            target,
            arguments={"pretrained": name or type(model).__name__, "add_bos_token": with_bos},
            options={
                "limit": int(limit) if limit is not None and limit >= 1 else limit,
                "num_fewshot": shots,
                "apply_chat_template": chat,
                "batch_size": batch_size,
                "bootstrap_iters": bootstrap,
            },
        )
    model.train(was_training)
    return TaskResults(
        scores=tuple(_scores(raw)),
        bos=with_bos,
        limit=limit,
        file=target,
        version=raw.get("lm_eval_version", ""),
        seconds=time.perf_counter() - started,
    )


def _evaluate(
    model: Any,
    tokenizer: Any,
    names: list[str],
    folder: Path | None,
    target: Path | None,
    *,
    arguments: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    manager, found = _manager(names, folder)
    # lm-eval names its file after the model and the date: let it, in a folder of its own, and move the file
    with tempfile.TemporaryDirectory(dir=target.parent if target else None, prefix=".lm-eval.") as scratch:
        tracker = EvaluationTracker(output_path=scratch)
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=options["batch_size"],
            add_bos_token=arguments["add_bos_token"],
        )
        raw: Any = lm_eval.simple_evaluate(
            model=lm,
            model_args=arguments,
            tasks=found,
            task_manager=manager,
            evaluation_tracker=tracker,
            log_samples=False,
            **options,
        )
        if raw is None:
            raise CorankError("This process has no results: lm-eval gives them to the first process only.")
        if target is not None:
            tracker.save_results_aggregated(results=raw)
            written = list(Path(scratch).rglob("results_*.json"))
            if not written:  # lm-eval logs what went wrong, and goes on
                raise CorankError(f"lm-eval could not write its results for {target}; see what it said above.")
            os.replace(written[0], target)
    return raw


def _manager(names: list[str], folder: Path | None) -> tuple[Any, list[str]]:
    """(lm-eval's task manager, the names with globs expanded).

    Raises:
        CorankError: a name is not known.
    """
    from lm_eval.tasks import TaskManager

    class LocalTaskManager(TaskManager):
        """Loads tasks with their folder as the working directory, and says what to do if that fails."""

        def load(self, task_list: Any) -> Any:
            try:
                with contextlib.chdir(folder or "."):
                    return super().load(task_list)
            except Exception as error:  # anything at all: from no network to a mistake in somebody's task file
                asked = ", ".join(str(t) for t in (task_list if isinstance(task_list, list) else [task_list]))
                reason = next(iter(str(error).strip().splitlines()), "")
                raise CorankError(
                    f"The data of {asked} could not be loaded ({type(error).__name__}: {reason}); without a network, "
                    "give task files with local data as --tasks-dir FOLDER (see docs/evaluation.md)."
                ) from error

    manager = None
    if folder is not None:
        manager = LocalTaskManager(include_path=str(folder), include_defaults=False)
        if not manager.all_tasks:
            raise CorankError(f"{folder} holds no lm-eval task file (.yaml with `task:` or `group:`).")
    if manager is None or not _complete(manager, names):
        manager = LocalTaskManager(include_path=None if folder is None else str(folder))
    found: list[str] = []
    for name in names:
        matches = [name] if name in manager.task_index else manager.match_tasks([name])
        if not matches:
            raise unknown("task", name, manager.all_tasks)
        found += [m for m in matches if m not in found]
    return manager, found


def _complete(manager: Any, names: Sequence[str]) -> bool:
    """Whether the manager knows all names, and all members of the groups among them."""
    index = manager.task_index

    def known(name: str) -> bool:
        if name not in index:
            return bool(manager.match_tasks([name]))
        members = (index[name].cfg or {}).get("task")
        return not isinstance(members, list) or all(member(m) for m in members)

    def member(entry: Any) -> bool:
        if isinstance(entry, str):
            return known(entry)
        inner = entry.get("task")
        if isinstance(inner, str):  # a new task needs an output_type of its own; without one it alters a stock task
            return inner in index or "output_type" in entry
        return all(member(m) for m in inner) if isinstance(inner, list) else known(entry.get("group", ""))

    return all(known(name) for name in names)


def _scores(raw: Mapping[str, Any]) -> Iterator[Score]:
    better, counts, shots = (raw.get(key, {}) for key in ("higher_is_better", "n-samples", "n-shot"))
    for task, metrics in raw["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            spread = metrics.get(f"{metric}_stderr,{kind}")
            samples = counts.get(task, {}).get("effective", metrics.get("sample_len", 0))
            yield Score(
                task=task,
                metric=metric,
                filter=kind,
                value=float(value),
                stderr=float(spread) if isinstance(spread, int | float) else None,
                higher_is_better=(better.get(task) or {}).get(metric),
                samples=int(samples),
                shots=shots.get(task),
            )


@contextlib.contextmanager
def _calm(quiet: bool) -> Iterator[None]:
    """Keep standard output for results; with `quiet`, also drop lm-eval's bars and remarks."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    # Always said when a model is an object: that other arguments may be ignored.
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stderr):
            with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
                yield
    finally:
        logger.setLevel(before)
