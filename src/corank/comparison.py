"""Several methods at several budgets on one model, with the same calibration: one table and one Pareto front."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from corank import recipe
from corank.api import compress, load
from corank.assess import assess, perplexities, write_documents
from corank.budget import Budget
from corank.errors import CorankError
from corank.evaluate import Cell, grid
from corank.evaluate import compare as run_cells
from corank.jsonfile import read_json, write_json
from corank.model import Text, read_text
from corank.report import Report
from corank.report.html import write_html


def compare_methods(
    model: str,
    methods: Sequence[str],
    keep: Sequence[str],
    out: Path,
    *,
    texts: Sequence[Text],
    windows: int | None,
    window: int,
    settings: Mapping[str, Any],
    data: str | Sequence[str],
    samples: int,
    length: int,
    seed: int,
    batch: int,
    device: str = "cpu",
    dtype: str | None = None,
    save_models: bool = False,
    watch: Any = None,
) -> tuple[list[Report], dict[str, str]]:
    """Fill the grid methods x budgets; finished cells are not computed again.

    Statistics are measured once and shared by all methods that need them.

    Returns:
        (reports in the order of the grid, reason by cell for the cells that could not be made, such as a budget that a
        method cannot meet).

    Raises:
        CorankError: an unknown method or setting, a bad budget, or a directory that holds a different comparison.
    """
    chosen = {name: own_settings(name, settings) for name in methods}
    unused = set(settings) - set().union(*(set(s) for s in chosen.values()))
    if unused:
        raise CorankError(f"None of {', '.join(methods)} has a setting {sorted(unused)[0]!r}.")
    budgets = [{"keep": Budget.parse(keep=k).keep} for k in keep]
    calibration_text = read_text(data)
    options = {
        "data": calibration_text.sha256[:16],
        "samples": samples,
        "length": length,
        "seed": seed,
        "windows": windows,
        "window": window,
        "texts": [t.sha256[:16] for t in texts],
        "set": {k: str(v) for k, v in settings.items()},
    }
    claim(out, {"model": model, **{k: v for k, v in options.items() if k != "set"}})
    step: Callable[[str, int, int], None] = watch.step if watch is not None else (lambda what, done, of: None)
    before = _dense(model, out, texts, windows, window, step)

    def run(cell: Cell) -> dict[str, Any]:
        target = out / model_folder(cell)
        shutil.rmtree(target, ignore_errors=True)
        if watch is not None:
            watch.close()
            watch.name = f"{cell.method} {cell.budget['keep']:g}"
        report = compress(
            model,
            cell.method,
            **cell.budget,
            out=target,
            data=calibration_text,
            samples=samples,
            length=length,
            seed=seed,
            batch=batch,
            device=device,
            dtype=dtype,
            cache=out / "statistics",
            progress=watch,
            **chosen[cell.method],
        )
        report = assess(report, model, target, texts, windows=windows, window=window, known=before, step=step)
        if save_models:
            write_documents(report, target)
        else:
            shutil.rmtree(target)
        return {"report": report.to_json()}

    cells = grid(methods, budgets, options)
    rows = run_cells(cells, run, out / "cells")
    reports, failed = [], {}
    for cell, row in zip(cells, rows, strict=True):
        if "error" in row:
            failed[f"{cell.method} at keep={cell.budget['keep']:g}"] = row["error"].removeprefix("CorankError: ")
        else:
            reports.append(Report.from_json(row["report"]))
    write_summary(reports, failed, out)
    shutil.rmtree(out / "statistics", ignore_errors=True)
    return reports, failed


def model_folder(cell: Cell) -> str:
    """Name of the directory of a cell's model, e.g. ``svd-llm-0.8``."""
    return f"{cell.method}-{cell.budget['keep']:g}"


def own_settings(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that a method has, checked.

    Raises:
        CorankError: unknown method, or a value of the wrong type.
    """
    entry = recipe.get(method)
    own = {k: v for k, v in settings.items() if k in entry.parameters or k in entry.kind.COMMON}
    entry.recipe(**own)
    return own


def claim(out: Path, identity: dict[str, Any]) -> None:
    """Take a directory for a comparison, or go on in one with the same model and protocol."""
    note = out / "comparison.json"
    if note.is_file():
        if read_json(note).get("identity") != json.loads(json.dumps(identity)):
            raise CorankError(f"{out} holds a comparison with another model or protocol; choose another directory.")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CorankError(f"{out} is not empty and holds no comparison; choose another directory.")
    write_json(note, {"identity": identity})


def _dense(
    model: str,
    out: Path,
    texts: Sequence[Text],
    windows: int | None,
    window: int,
    step: Callable[[str, int, int], None],
) -> dict[str, Any]:
    file = out / "dense.json"
    if not file.is_file():
        dense, tokenizer = load(model)
        write_json(file, perplexities(dense, tokenizer, texts, windows, window, "the dense model", step))
    return read_json(file)


def write_summary(reports: Sequence[Report], failed: Mapping[str, str], out: Path) -> None:
    """comparison.json, comparison.html and the Pareto front as a picture."""
    note = read_json(out / "comparison.json")
    write_json(out / "comparison.json", {**note, "reports": [r.to_json() for r in reports], "failed": dict(failed)})
    if not reports:
        return
    write_html(reports, out / "comparison.html")
    from corank.report import plots

    plots.save(plots.pareto(reports), out / "pareto.png")
