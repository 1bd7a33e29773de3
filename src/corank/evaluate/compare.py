"""A grid of methods and budgets, one JSON file per cell: a killed comparison goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from corank.errors import CorankError
from corank.jsonfile import encode, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid: a method, a budget and options. Its name depends on nothing else.

    Attributes:
        method: name of the method.
        budget: keyword arguments of the budget, e.g. ``{"keep": 0.8}``.
        options: further JSON values that tell this cell from others, e.g. hyper-parameters or a seed.
    """

    method: str
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """A file name: readable, and unique by a digest of the whole cell."""
        text = json.dumps(encode(self.to_json()), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        words = [self.method, *(f"{key}={value}" for key, value in sorted(self.budget.items()))]
        return "_".join(re.sub(r"[^\w.=+-]+", "-", word) for word in words)[:100] + f"_{digest}"

    def to_json(self) -> dict[str, Any]:
        """{"method", "budget", "options"}."""
        return {"method": self.method, "budget": dict(self.budget), "options": dict(self.options)}


def grid(
    methods: Sequence[str], budgets: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
) -> list[Cell]:
    """All methods at all budgets, e.g. ``grid(["svd", "svd-llm"], [{"keep": 0.8}, {"keep": 0.6}])``."""
    return [Cell(method, dict(budget), dict(options or {})) for method in methods for budget in budgets]


def compare(
    cells: Sequence[Cell],
    run: Callable[[Cell], Mapping[str, Any]],
    directory: str | Path,
    *,
    keep_going: bool = True,
    progress: Callable[[int, int, Cell], None] | None = None,
) -> list[dict[str, Any]]:
    """Run every cell that has no result in ``directory`` yet and return the rows of all, in order.

    Args:
        cells: the grid; no cell twice.
        run: does the work of a cell and returns a mapping of JSON values (non-finite numbers allowed).
        directory: holds ``<cell.name>.json`` for each finished cell. Files of other cells are left alone.
        keep_going: an exception in a cell becomes a row with ``"error"`` and ``"traceback"`` and the next
            cell runs; the failed cell is tried again next time. False: the exception is raised. A keyboard
            interrupt always is.
        progress: called with (cells done, cells in all, the cell) before each cell that has to run.

    Returns:
        Rows ``{"method", "budget", "options", "seconds", **result}``, or with ``"error"`` in place of the
        result.

    Raises:
        CorankError: a cell occurs twice, or a result is not a mapping of JSON values.
    """
    directory = Path(directory)
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CorankError(f"The grid has the same cell twice ({twice[0]}); give every cell once.")
    rows: list[dict[str, Any]] = []
    for done, (cell, name) in enumerate(zip(cells, names, strict=True)):
        path = directory / f"{name}.json"
        row = _finished(path)
        if row is None:
            if progress is not None:
                progress(done, len(cells), cell)
            row = _run(cell, run, keep_going)
            write_json(path, row)
        rows.append(row)
    return rows


def _run(cell: Cell, run: Callable[[Cell], Mapping[str, Any]], keep_going: bool) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        result = run(cell)
        if not isinstance(result, Mapping):
            raise CorankError(f"run() returned a {type(result).__name__}; return a dict of JSON values.")
        encode(result)
    except Exception as error:
        if not keep_going:
            raise
        result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {**cell.to_json(), "seconds": time.perf_counter() - started, **result}


def _finished(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        row = read_json(path)
    except CorankError:
        return None
    return None if "error" in row else row
