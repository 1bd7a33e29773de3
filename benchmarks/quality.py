"""Perplexity of a real model after compression, every method with the same calibration tokens, the dense model beside.

    python -m benchmarks quality --calibration wiki.valid.raw.txt.gz --test wiki.test.raw.txt.gz --other web.jsonl.gz

Calibration is 64 windows of 512 tokens; statistics are measured once and shared. Interrupted, it goes on with the next cell.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import add_arguments, fill, line, protocol_of
from corank.evaluate import Cell

CELLS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("best", {"keep": 0.8}, {}),
    ("best", {"keep": 0.6}, {}),
    # the ladder: one step at a time from plain SVD to all of `best`
    ("svd", {"keep": 0.8}, {}),
    ("svd-llm", {"keep": 0.8}, {}),
    ("svd-llm", {"keep": 0.8}, {"pack": True}),
    ("best", {"keep": 0.8}, {"allocate": "uniform", "pack": False}),
    ("best", {"keep": 0.8}, {"allocate": "uniform"}),
    ("best", {"keep": 0.8}, {"families": "factorize", "pack": False}),
    ("best", {"keep": 0.8}, {"families": "factorize"}),
    ("best", {"keep": 0.6}, {"families": "factorize"}),
    ("best", {"keep": 0.8}, {"effort": "balanced"}),
    ("best", {"keep": 0.8}, {"effort": "max"}),
    ("best", {"keep": 0.6}, {"effort": "max"}),
    ("best", {"keep": 0.8}, {"target": "anchored"}),
    ("svd-llm", {"keep": 0.8}, {"pack": True, "allocate": "lagrange"}),
    ("svd-llm", {"keep": 0.6}, {}),
    ("svd-llm", {"keep": 0.6}, {"pack": True}),
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
    add_arguments(parser, work="runs/quality", out="benchmarks/results/quality.json")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only the first so many cells")
    args = parser.parse_args(arguments)
    work, cells = Path(args.work), [Cell(*c) for c in CELLS[: args.cells]]
    fill(cells, protocol_of(args), work, Path(args.out), lambda row: print(line(row), flush=True))
    if len(cells) == len(CELLS):
        shutil.rmtree(work / "statistics", ignore_errors=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
