"""Every registered method that makes a smaller model, at several sizes, with the same calibration tokens, on two texts: docs/leaderboard.md.

    python -m benchmarks leaderboard --calibration wiki.valid.raw.txt.gz --test wiki.test.raw.txt.gz --other web.jsonl.gz

One cell at a time: interrupted, it goes on with the next. `--quick` has its own table: two sizes, fewer windows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import add_arguments, fill, line, protocol_of
from corank import recipe
from corank.evaluate import Cell
from corank.probing import training
from corank.report.plots import pareto_points

FAMILIES = ("weights", "structured")
KEEP = (0.9, 0.8, 0.7, 0.6, 0.5)
QUICK_KEEP = (0.8, 0.6)
QUICK_SAMPLES, QUICK_WINDOWS = 16, 6
QUICK_MINUTES, QUICK_STEPS, QUICK_TRIALS = 0.75, 6, 6
"""For methods that train, and for those that try out whole plans."""
RESULTS = Path(__file__).resolve().parent / "results"


def cells_of(methods: list[str], keep: tuple[float, ...], quick: bool = False) -> list[Cell]:
    """Ratio by ratio, those that cost least first: no training, then no second activation stream."""
    order = sorted(methods, key=lambda n: (bool(options(n)), recipe.get(n).recipe().sequential, n != "best", n))
    return [Cell(name, {"keep": k}, options(name) if quick else {}) for k in keep for name in order]


def options(name: str) -> dict[str, Any]:
    """What bounds the time of a method that trains or tries, none for the others."""
    entry = recipe.get(name)
    made = entry.recipe()
    if made.allocate in (*training.FAMILIES, "acip"):
        return {"steps": QUICK_STEPS}
    if "minutes" in entry.parameters or getattr(made, "train", None) is not None:
        return {"minutes": QUICK_MINUTES}
    return {"trials": QUICK_TRIALS} if made.allocate == "bolaco" else {}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The Pareto plot of a table; methods that are ten times worse than dense everywhere are left out of it."""
    found = [r for r in rows if "ratio" in r and r["method"] != "dense"]
    lowest = {m: min(r["ratio"]["test"] for r in found if r["method"] == m) for m in {r["method"] for r in found}}
    points = {
        text: [
            (r["method"], r["accounting"]["sites"]["compressed"] / r["accounting"]["sites"]["dense"], r["ratio"][text])
            for r in found
            if lowest[r["method"]] < 10
        ]
        for text in ("test", "other")
    }
    if any(points.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        pareto_points(points).savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Run the cells that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks leaderboard", description=__doc__.split("\n", 1)[0])
    add_arguments(parser, work="", out="")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--keep", nargs="*", type=float, help="only these shares of the decoder's parameters")
    parser.add_argument("--cells", type=int, help="make at most so many new rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{len(QUICK_KEEP)} sizes, {QUICK_SAMPLES} calibration and {QUICK_WINDOWS} test windows, little training",
    )
    args = parser.parse_args(arguments)
    name = "leaderboard-quick" if args.quick else "leaderboard"
    if args.quick:
        args.samples, args.windows = QUICK_SAMPLES, QUICK_WINDOWS
    methods = args.methods or [m.name for family in FAMILIES for m in recipe.methods(family=family)]
    cells = cells_of(methods, tuple(args.keep or (QUICK_KEEP if args.quick else KEEP)), args.quick)
    torch.set_num_threads(args.threads)
    out = Path(args.out or RESULTS / f"{name}.json")
    rows = fill(
        cells,
        protocol_of(args),
        Path(args.work or f"runs/{name}"),
        out,
        lambda row: print(line(row), flush=True),
        limit=args.cells,
    )
    draw(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
