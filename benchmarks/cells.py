"""Cells of a table: compress a model in one way, measure perplexity on two texts, keep the row; finished rows are not made again."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import corank
from benchmarks.hardware import hardware
from corank.evaluate import Cell, compare
from corank.jsonfile import write_json
from corank.model import Text, read_text


@dataclass(frozen=True)
class Protocol:
    """What all cells of a table share.

    Attributes:
        model: as for `corank.compress`.
        calibration: text to calibrate on.
        texts: "test", of the calibration domain, and "other", outside it.
        samples, length: calibration windows and tokens in each.
        windows: evenly spaced test windows per text, None for all.
        window: tokens of a test window.
    """

    model: str
    calibration: Text
    texts: dict[str, Text]
    samples: int = 64
    length: int = 512
    windows: int | None = 48
    window: int = 512

    def to_json(self) -> dict[str, Any]:
        """With digests in place of the texts."""
        return {
            "model": self.model,
            "windows": self.windows,
            "window": self.window,
            "calibration": {
                "text": self.calibration.source,
                "sha256": self.calibration.sha256,
                "samples": self.samples,
                "length": self.length,
            },
            "texts": {k: {"text": t.source, "sha256": t.sha256} for k, t in self.texts.items()},
        }


def add_arguments(parser: argparse.ArgumentParser, *, work: str, out: str) -> None:
    """The options that every table of cells has."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", action="append", help="may be repeated: a mixture (default: builtin)")
    parser.add_argument("--test", default="builtin-test")
    parser.add_argument("--other", default="builtin-code", help="text outside the calibration domain")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument(
        "--windows", type=int, default=48, help="evenly spaced windows of 512 tokens per text; 0 for all"
    )
    parser.add_argument("--work", default=work, help="where finished cells and statistics are kept")
    parser.add_argument("--out", default=out)


def protocol_of(args: argparse.Namespace) -> Protocol:
    """The protocol that was asked for."""
    texts = {"test": read_text(args.test), "other": read_text(args.other)}
    return Protocol(
        args.model,
        read_text(args.calibration or ["builtin"]),
        texts,
        samples=args.samples,
        windows=args.windows or None,
    )


def fill(
    cells: Sequence[Cell],
    protocol: Protocol,
    work: Path,
    out: Path,
    finished: Callable[[dict[str, Any]], None] = lambda row: None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Run the cells that have no row yet, and write the table after each.

    Statistics and spectra are measured once and shared through `work`.

    Args:
        limit: make no more than so many new rows.

    Returns:
        the rows, the dense model's first; each has "ratio", its perplexities over the dense ones.
    """
    work.mkdir(parents=True, exist_ok=True)

    def perplexities(model: Any, tokenizer: Any) -> dict[str, Any]:
        return {
            k: corank.evaluate(model, tokenizer, t, window=protocol.window, max_windows=protocol.windows).to_json()
            for k, t in protocol.texts.items()
        }

    def run(cell: Cell) -> dict[str, Any]:
        if cell.method == "dense":
            return {"perplexity": perplexities(*corank.load(protocol.model))}
        with tempfile.TemporaryDirectory(dir=work) as folder:
            model = Path(folder) / "model"
            report = corank.compress(
                protocol.model,
                cell.method,
                out=model,
                data=protocol.calibration,
                samples=protocol.samples,
                length=protocol.length,
                cache=work / "statistics",
                **cell.budget,
                **cell.options,
            )
            found = perplexities(*corank.load(model))
        return {
            "perplexity": found,
            "accounting": report.accounting,
            "stages": report.stages,
            "peak_memory_bytes": report.peak_memory_bytes,
            "class": report.structure.get("class"),
            "loss": mean(losses) if (losses := [s["loss"] for s in report.sites if s["loss"] is not None]) else None,
        }

    rows: list[dict[str, Any]] = []
    made = 0
    for cell in [Cell("dense"), *cells]:
        if limit is not None and made >= limit and not (work / "cells" / f"{cell.name}.json").exists():
            continue
        made += not (work / "cells" / f"{cell.name}.json").exists()
        (row,) = compare([cell], run, work / "cells", keep_going=True)
        rows.append(row)
        if "error" not in row:
            row["ratio"] = {k: v["value"] / rows[0]["perplexity"][k]["value"] for k, v in row["perplexity"].items()}
        finished(row)
        write_json(out, {"hardware": hardware(), **protocol.to_json(), "rows": rows})
    return rows


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "error" in row:
        return f"{row['method']} {row['budget']}: {row['error']}"
    kept = row.get("accounting", {}).get("sites", {"compressed": 1, "dense": 1})
    label = " ".join([row["method"], *(f"{k}={v}" for k, v in {**row["budget"], **row["options"]}.items())])
    both = "  ".join(f"{k} {row['perplexity'][k]['value']:10.2f} (x{row['ratio'][k]:.3f})" for k in row["ratio"])
    seconds = {k: round(v, 1) for k, v in row.get("stages", {}).items()}
    return f"{label:45s} kept {kept['compressed'] / kept['dense']:.4f}  {both}  {seconds}"
