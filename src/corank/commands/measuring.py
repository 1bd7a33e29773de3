"""`corank eval`, `corank bench` and `corank generate`."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from corank.api import load, to_dtype
from corank.assess import perplexities
from corank.commands.arguments import read_texts
from corank.commands.output import console, emit
from corank.errors import CorankError
from corank.evaluate import sample, speed
from corank.evaluate.tasks import TaskResults, run_tasks
from corank.report import numbers
from corank.report.table import prediction_table, speed_table
from corank.timing import MODES, PAYS, RUNTIMES, anatomy, drawback, find_device, predict, stored_dtype
from corank.watch import Watch


def eval(args: Namespace) -> int:
    """``corank eval``: perplexity, or tasks of lm-eval, or both if texts are named as well."""
    results = _results_file(args) if args.tasks else None
    texts = [] if args.tasks and not args.text else read_texts(args.text)
    model, tokenizer = load(args.model, device=args.device, runtime=args.runtime)
    watch = Watch("eval", 1, args.quiet)
    found = perplexities(model, tokenizer, texts, args.windows or None, args.window, str(args.model), watch.step)
    watch.close()
    shown: dict[str, Any] = {"model": str(args.model), "perplexity": found}
    tasks = None
    if results is not None:
        tasks = run_tasks(
            model,
            tokenizer,
            args.tasks.split(","),
            name=str(args.model),
            tasks_dir=args.tasks_dir,
            limit=args.limit,
            shots=args.shots,
            chat=args.chat,
            batch_size=args.batch,
            results=results,
            quiet=args.quiet,
        )
        shown["tasks"] = tasks.to_json()
    if args.json:
        emit(shown)
        return 0
    if found:
        console().print(_perplexity_table(str(args.model), found))
    if tasks is not None:
        console().print(_score_table(str(args.model), tasks))
        print(f"The results as lm-eval {tasks.version} writes them: {tasks.file}")
    return 0


def _results_file(args: Namespace) -> Path:
    """Where lm-eval's JSON goes: where the user says, else a new file here."""
    if args.results:
        return Path(args.results)
    return Path(f"{Path(args.model).name}-lm-eval-{time.strftime('%Y%m%d-%H%M%S')}.json")


def _perplexity_table(title: str, found: Mapping[str, dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in ("Text", "Perplexity", "Windows", "Tokens", "BOS", "Seconds"):
        table.add_column(head, justify="left" if head == "Text" else "right")
    for name, row in found.items():
        spread = row["value"] * row["stderr"]
        value = f"{numbers.number(row['value'])} ± {numbers.number(spread, 2)}"
        table.add_row(
            name,
            value,
            f"{row['windows']} × {row['window']}",
            str(row["tokens"]),
            "yes" if row["bos"] else "no",
            f"{row['seconds']:.1f}",
        )
    return table


def _score_table(title: str, tasks: TaskResults) -> Table:
    table = Table(title=f"{title}, texts {'with' if tasks.bos else 'without'} BOS", title_justify="left")
    for head in ("Task", "Metric", "Value", "Better", "Documents", "Shots"):
        table.add_column(head, justify="left" if head in ("Task", "Metric") else "right")
    for score in tasks.scores:
        value = numbers.number(score.value, 4)
        better = {True: "higher", False: "lower", None: "–"}[score.higher_is_better]
        table.add_row(
            score.task,
            score.metric if score.filter == "none" else f"{score.metric}, {score.filter}",
            value if score.stderr is None else f"{value} ± {numbers.number(score.stderr, 2)}",
            better,
            str(score.samples),
            "–" if score.shots is None else str(score.shots),
        )
    return table


def bench(args: Namespace) -> int:
    """``corank bench``."""
    try:
        batches = [int(b) for b in args.batch.split(",")]
    except ValueError:
        raise CorankError(f"--batch takes numbers separated by commas, not {args.batch!r}.") from None
    if args.baseline is None and not args.predict:
        raise CorankError("Give --baseline, the dense model to compare with, or --predict to time nothing.")
    if args.device_model is not None and not args.predict:
        raise CorankError("--device-model is what --predict predicts for; give both.")
    with threads(args.threads):
        return _bench(args, batches)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, PyTorch computes with so many threads; None: as many as before.

    Raises:
        CorankError: fewer than one, or more than there are cores.
    """
    cores, before = os.cpu_count() or 1, torch.get_num_threads()
    if count is not None:
        if not 1 <= count <= cores:
            raise CorankError(f"--threads {count} does not suit this machine; give 1 to {cores}.")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bench(args: Namespace, batches: Sequence[int]) -> int:
    dtype = to_dtype(args.dtype)
    found: list[dict[str, Any]] = []
    if args.baseline is not None:
        models = {"dense": load(args.baseline, dtype=dtype)[0]}
        for name in args.models:
            for runtime in args.runtime.split(","):
                label = Path(name).name if runtime == "torch" else f"{Path(name).name} ({runtime})"
                models[label] = load(name, dtype=dtype, runtime=runtime)[0]
        for sentence in dict.fromkeys(drawback(model.dtype, model.device) for model in models.values()):
            if sentence is not None:
                print(sentence, file=sys.stderr)
        rows = speed(
            models,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            batch_sizes=batches,
            repeats=args.repeats,
            predict=args.predict,
        )
        found = [row.to_json() for row in rows]
    expected = []
    if args.predict and (args.baseline is None or args.device_model is not None):
        expected = _predictions(args.models, args.device_model, batches, args.prompt_tokens, dtype)
    if args.json:
        emit({"measured": found, "predicted": expected} if args.predict else found)
        return 0
    if found:
        console().print(speed_table(found))
    if expected:
        console().print(prediction_table(expected))
        for line in _verdicts(expected):
            print(line)
    return 0


def _predictions(
    names: Sequence[str], device: str | None, batches: Sequence[int], context: int, dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """Every model in every runtime, beside what it was before it was compressed; from configurations alone."""
    rows = []
    for name in names:
        model = anatomy(name)
        where = find_device(device, dtype or stored_dtype(name))
        runtimes = [name for name in RUNTIMES if name != "triton" or where.threads is None]  # no kernels on a CPU
        for mode, batch, runtime in itertools.product(MODES, batches, runtimes):
            if mode == "decode" and not model.causal:
                continue
            step = predict(model, where, batch, context, mode, runtime)
            before = predict(model.dense(), where, batch, context, mode, runtime)
            speedup = before.seconds / step.seconds if model.factorized else None
            rows.append({**step.to_json(), "speedup": speedup, "dense_seconds": before.seconds})
    return rows


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of every compressed model, whether it is faster anywhere."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows if row["speedup"] is not None):
        best = max((row for row in rows if row["model"] == name), key=lambda row: row["speedup"])
        where = f"{best['mode']}, batch {best['batch']}, runtime {best['runtime']}"
        if best["speedup"] < PAYS:
            lines.append(f"{name}: memory only; at best {best['speedup']:.2f} times as fast as dense ({where}).")
        else:
            lines.append(f"{name}: at best {best['speedup']:.2f} times as fast as dense ({where}).")
    return lines


def generate(args: Namespace) -> int:
    """``corank generate``."""
    model, tokenizer = load(args.model, runtime=args.runtime)
    result = sample(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.tokens,
        seed=args.seed,
        temperature=args.temperature,
        chat=args.chat,
    )
    emit(result.to_json()) if args.json else print(result.completion if args.chat else args.prompt + result.completion)
    return 0
