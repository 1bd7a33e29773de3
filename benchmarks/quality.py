"""Perplexity of a real model after compression, every method with the same calibration tokens, the dense model beside.

    python -m benchmarks quality --calibration wiki.valid.raw.txt.gz --test wiki.test.raw.txt.gz --other web.jsonl.gz

Calibration is 64 windows of 512 tokens; statistics are measured once and shared. Interrupted, it goes on with the next cell.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import corank
from benchmarks.hardware import hardware
from corank.evaluate import Cell, compare
from corank.jsonfile import write_json
from corank.model import read_text

CELLS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("best", {"keep": 0.8}, {}),
    ("best", {"keep": 0.6}, {}),
    ("svd-llm", {"keep": 0.8}, {}),
    ("svd-llm", {"keep": 0.8}, {"pack": True}),
    ("svd-llm", {"keep": 0.8}, {"pack": True, "allocate": "lagrange"}),
    ("svd-llm", {"keep": 0.6}, {}),
    ("svd-llm", {"keep": 0.6}, {"pack": True}),
    ("svd", {"keep": 0.8}, {}),
    ("asvd", {"keep": 0.8}, {}),
    ("curing", {}, {}),
    ("cur-fast", {"keep": 0.8}, {}),
    ("curing", {"keep": 0.8}, {}),
    ("kfac-svd", {"keep": 0.8}, {}),
    ("col-id", {"keep": 0.8}, {}),
    ("row-id", {"keep": 0.8}, {}),
    ("lord", {"keep": 0.8}, {}),
    ("fwsvd", {"keep": 0.8}, {}),
    ("svd-llm", {"keep": 0.8}, {"target": "shifted"}),
    ("svd-llm", {"keep": 0.8}, {"update": True}),
    ("svd-llm", {"keep": 0.8}, {"target": "anchored"}),
)


def main(arguments: list[str] | None = None) -> None:
    """Run the cells that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks quality", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--test", default="builtin-test")
    parser.add_argument("--other", default="builtin-code", help="text outside the calibration domain")
    parser.add_argument(
        "--windows", type=int, default=48, help="evenly spaced windows of 512 tokens per text; 0 for all"
    )
    parser.add_argument("--work", default="runs/quality", help="where finished cells and statistics are kept")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only the first so many cells")
    parser.add_argument("--out", default="benchmarks/results/quality.json")
    args = parser.parse_args(arguments)
    work = Path(args.work)
    calibration, texts = read_text(args.calibration), {"test": read_text(args.test), "other": read_text(args.other)}
    windows = args.windows or None

    def measure(model: Any, tokenizer: Any) -> dict[str, Any]:
        return {k: corank.evaluate(model, tokenizer, t, max_windows=windows).to_json() for k, t in texts.items()}

    def run(cell: Cell) -> dict[str, Any]:
        if cell.method == "dense":
            return {"perplexity": measure(*corank.load(args.model))}
        with tempfile.TemporaryDirectory(dir=work) as folder:
            out = Path(folder) / "model"
            report = corank.compress(
                args.model,
                cell.method,
                out=out,
                data=calibration,
                samples=64,
                length=512,
                cache=work / "statistics",
                **cell.budget,
                **cell.options,
            )
            found = measure(*corank.load(out))
        return {
            "perplexity": found,
            "accounting": report.accounting,
            "stages": report.stages,
            "peak_memory_bytes": report.peak_memory_bytes,
            "loss": sum(s["loss"] for s in report.sites) / len(report.sites),
        }

    work.mkdir(parents=True, exist_ok=True)
    cells = [Cell("dense"), *(Cell(*c) for c in CELLS[: args.cells])]
    rows = []
    for cell in cells:
        (row,) = compare([cell], run, work / "cells", keep_going=True)
        rows.append(row)
        dense = rows[0]["perplexity"]
        if "error" in row:
            print(f"{cell.name}: {row['error']}", flush=True)
            continue
        row["ratio"] = {k: v["value"] / dense[k]["value"] for k, v in row["perplexity"].items()}
        kept = row.get("accounting", {}).get("sites", {"compressed": 1, "dense": 1})
        label = " ".join([cell.method, *(f"{k}={v}" for k, v in {**cell.budget, **cell.options}.items())])
        print(
            f"{label:45s} kept {kept['compressed'] / kept['dense']:.4f}  test {row['perplexity']['test']['value']:10.2f} "
            f"(x{row['ratio']['test']:.3f})  other {row['perplexity']['other']['value']:10.2f} (x{row['ratio']['other']:.3f})  "
            f"{ {k: round(v, 1) for k, v in row.get('stages', {}).items()} }",
            flush=True,
        )
        write_json(
            args.out,
            {
                "hardware": hardware(),
                "model": args.model,
                "windows": windows,
                "window": 512,
                "calibration": {"text": calibration.source, "sha256": calibration.sha256, "samples": 64, "length": 512},
                "texts": {k: {"text": t.source, "sha256": t.sha256} for k, t in texts.items()},
                "rows": rows,
            },
        )
    if len(rows) == len(CELLS) + 1:
        shutil.rmtree(work / "statistics", ignore_errors=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
