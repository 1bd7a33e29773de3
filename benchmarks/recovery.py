"""What every way to heal wins back, for several methods and sizes: perplexity on two texts against minutes of training.

    python -m benchmarks recovery --calibration wiki.valid.raw.txt.gz --test wiki.test.raw.txt.gz --other web.jsonl.gz
    python -m benchmarks recovery --starts best:0.8 --ways kd block --minutes 2 10

Every method is compressed once; each way starts from that result, learns from the calibration text alone, and stops by the
clock. Finished rows are kept in --work and not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import corank
from benchmarks.cells import Protocol, add_arguments, protocol_of
from benchmarks.hardware import hardware
from corank.errors import CorankError
from corank.evaluate import PeakMemory
from corank.heal import Schedule, list_ways
from corank.jsonfile import read_json, write_json

STARTS = (
    "svd-llm:0.8",
    "curing:0.9",
    "modegpt:0.8",
    "best:0.8",
    "svd-llm:0.6",
    "curing:0.8",
    "modegpt:0.6",
    "best:0.6",
)


def perplexities(protocol: Protocol, place: str | Path) -> dict[str, float]:
    """Of a model, on each text."""
    model, tokenizer = corank.load(place)
    return {
        k: corank.evaluate(model, tokenizer, t, window=protocol.window, max_windows=protocol.windows).value
        for k, t in protocol.texts.items()
    }


def compressed(protocol: Protocol, start: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """Directory of a model that has been compressed once, and its row."""
    method, keep = start.split(":")
    folder, file = work / "models" / start.replace(":", "-"), work / f"{start.replace(':', '-')}.json"
    if not file.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        report = corank.compress(
            protocol.model,
            method,
            keep=float(keep),
            out=folder,
            data=protocol.calibration,
            samples=protocol.samples,
            length=protocol.length,
            cache=work / "statistics",
        )
        row = {"start": start, "way": None, "minutes": 0.0, "accounting": report.accounting}
        write_json(file, {**row, "perplexity": perplexities(protocol, folder)})
    return folder, read_json(file)


def healed(protocol: Protocol, start: str, way: str, minutes: float, folder: Path) -> dict[str, Any]:
    """Heal a compressed model for some minutes, and measure."""
    row: dict[str, Any] = {"start": start, "way": way, "minutes": minutes}
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        out = Path(place) / "healed"
        try:
            with PeakMemory() as memory:
                told = corank.heal(
                    folder,
                    protocol.model,
                    way,
                    out=out,
                    data=protocol.calibration,
                    samples=protocol.samples,
                    length=protocol.length,
                    schedule=Schedule(epochs=1000.0, minutes=minutes),
                    tests=list(protocol.texts.values()),
                )
        except CorankError as error:
            return {**row, "error": str(error)}
        found = perplexities(protocol, out)
    return {
        **row,
        "perplexity": found,
        "trained": told.trained,
        "seconds": told.seconds,
        "heldout": [told.before, told.after],
        "curve": told.curve,
        "peak_memory_bytes": memory.peak_bytes,
    }


def run(
    protocol: Protocol, starts: Sequence[str], ways: Sequence[str], minutes: Sequence[float], work: Path, out: Path
) -> None:
    """Make the rows that are not there yet, write them, and print the table."""
    key = hashlib.sha256(json.dumps(protocol.to_json(), sort_keys=True).encode()).hexdigest()[:12]
    work = work / key
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "dense.json").is_file():
        write_json(work / "dense.json", {"perplexity": perplexities(protocol, protocol.model)})
    dense = read_json(work / "dense.json")["perplexity"]
    rows: list[dict[str, Any]] = []
    for start in starts:
        folder, row = compressed(protocol, start, work)
        mine = [row]
        for way in ways:
            for budget in minutes:
                file = work / f"{start.replace(':', '-')}-{way}-{budget:g}.json"
                if not file.is_file():
                    write_json(file, healed(protocol, start, way, budget, folder))
                mine.append(read_json(file))
        for row in mine:
            if "perplexity" in row:
                row["ratio"] = {k: v / dense[k] for k, v in row["perplexity"].items()}
            print(line(row), flush=True)
        rows += mine
        write_json(out, {"hardware": hardware(), **protocol.to_json(), "dense": dense, "rows": rows})
    show(rows)
    draw(rows, out.with_suffix(".png"))


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    label = f"{row['start']} {row['way'] or 'not healed'} {row['minutes']:g} min"
    if "error" in row:
        return f"{label}: {row['error']}"
    return f"{label}: " + "  ".join(f"{k} x{v:.3f}" for k, v in row["ratio"].items())


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table: ratios to the dense perplexity, on both texts."""
    table = Table(title="perplexity over that of the dense model, by way to heal", title_justify="left")
    for head in ("Model", "Way", "Minutes", "Trained values", "Test", "Other", "Peak memory"):
        table.add_column(head, justify="left" if head in ("Model", "Way") else "right")
    for row in (r for r in rows if "ratio" in r):
        peak = f"{row['peak_memory_bytes'] / 2**30:.2f} GiB" if row["way"] else ""
        spent = f"{row['seconds'] / 60:.1f}" if row["way"] else ""
        trained = f"{row['trained']:,}" if row["way"] else ""
        both = [f"{row['ratio'][k]:.3f}" for k in ("test", "other")]
        table.add_row(row["start"], row["way"] or "not healed", spent, trained, *both, peak)
    Console().print(table)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity over dense against minutes, a panel per model and text."""
    from corank.report.canvas import LIGHT, blank_figure, line_look, side_legend, style_axes

    starts = list(dict.fromkeys(r["start"] for r in rows if r["way"] and "ratio" in r))
    ways = list(dict.fromkeys(r["way"] for r in rows if r["way"]))
    if not starts:
        return
    figure = blank_figure(9.5, 2.7 * len(starts) + 0.6, LIGHT)
    grid = figure.subplots(len(starts), 2, squeeze=False)
    for panels, start in zip(grid, starts, strict=True):
        first = next(r for r in rows if r["start"] == start and not r["way"])
        for axes, text in zip(panels, ("test", "other"), strict=True):
            for index, way in enumerate(ways):
                mine = sorted(
                    (r["seconds"] / 60, r["ratio"][text])
                    for r in rows
                    if r["start"] == start and r["way"] == way and "ratio" in r
                )
                if mine:
                    xs, ys = zip((0.0, first["ratio"][text]), *mine, strict=True)
                    axes.plot(xs, ys, label=way, linewidth=1.5, markersize=5, **line_look(index))
            axes.axhline(1, color=LIGHT.text, linewidth=1, linestyle=":")
            style_axes(axes, LIGHT)
            axes.set_title(f"{start}, {text}", fontsize=10, color=LIGHT.text)
            axes.set_xlabel("minutes of training", fontsize=9, color=LIGHT.text)
        panels[0].set_ylabel("perplexity / dense", fontsize=9, color=LIGHT.text)
    side_legend(figure, grid[0][-1], LIGHT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Fill the table, and print it."""
    parser = argparse.ArgumentParser(prog="benchmarks recovery", description=__doc__.split("\n", 1)[0])
    add_arguments(parser, work="runs/recovery", out="benchmarks/results/recovery.json")
    parser.add_argument("--starts", nargs="*", default=STARTS, help="METHOD:KEEP, several")
    parser.add_argument("--ways", nargs="*", default=list(list_ways()), help="ways to heal (default: all)")
    parser.add_argument("--minutes", nargs="*", type=float, default=[5.0], help="of training, several")
    args = parser.parse_args(arguments)
    run(protocol_of(args), args.starts, args.ways, args.minutes, Path(args.work), Path(args.out))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
