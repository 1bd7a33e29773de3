"""The tables and the plot of the speed benchmark, from its results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def require_dense(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a table in which something is compared with nothing.

    Raises:
        SystemExit: a model at some batch, or a matrix, has no dense row.
    """

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(str(row.get(k)) for k in ("model", "batch", "shape", "dtype", "tokens"))

    dense = {key(row) for row in rows if row["variant"] == "dense"}
    for row in rows:
        if key(row) not in dense:
            raise SystemExit(
                f"There is no dense row beside {row['variant']!r} of {key(row)}; a table without it is not printed."
            )


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the tables; what was left out for want of time has none."""
    if rows := result.get("linears"):
        require_dense(rows)
        table = Table(title="Single matrices: microseconds, times as fast as dense (range), predicted")
        for head in ("out x in", "dtype", "tokens", "variant", "us", "speed-up", "predicted"):
            table.add_column(head, justify="left" if head in ("variant", "dtype") else "right")
        for row in rows:
            grown = row["speedup"]
            table.add_row(
                "×".join(map(str, row["shape"])),
                row["dtype"],
                str(row["tokens"]),
                row["variant"],
                f"{1e6 * row['seconds']['median']:.0f}",
                f"{grown['median']:.2f} ({grown['min']:.2f}–{grown['max']:.2f})",
                f"{row['predicted_speedup']:.2f}",
            )
        console.print(table)
    if rows := result.get("chunked"):
        require_dense(rows)
        table = Table(
            title=f"{rows[0]['model']}, {rows[0]['tokens']} tokens: peak of activations, milliseconds, times as fast"
        )
        for head in ("variant", "peak MB", "saved", "ms", "as dense", "as unfused", "same bits"):
            table.add_column(head, justify="left" if head == "variant" else "right")
        for row in rows:
            table.add_row(
                row["variant"],
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['peak_saved']:.0%}",
                f"{1e3 * row['seconds']['median']:.1f}",
                f"{row['speedup']['median']:.2f}",
                f"{row['speedup_over_unfused']['median']:.2f}",
                {True: "yes", False: "no", None: "–"}[row["same_bits"]],
            )
        console.print(table)
    if rows := result.get("models"):
        require_dense(rows)
        table = Table(
            title="Models: milliseconds, times as fast as dense (range), predicted ms, of floor, without the output matrix "
            "as a share of 1 / keep; peak of activations"
        )
        heads = (
            "prefill ms",
            "speed-up",
            "predicted",
            "of floor",
            "of 1 / keep",
            "decode ms",
            "speed-up",
            "predicted",
            "of floor",
            "of 1 / keep",
            "peak MB",
        )
        for head in ("model", "batch", "variant", *heads):
            table.add_column(head, justify="left" if head in ("model", "variant") else "right")
        for row in rows:
            cells = [row["model"], str(row["batch"]), row["variant"]]
            for mode in ("prefill", "decode"):
                found = row.get(mode)
                if found is None:
                    cells += ["–"] * 5
                    continue
                grown = found["speedup"]
                cells += [
                    f"{1e3 * found['seconds']['median']:.1f}",
                    f"{grown['median']:.2f} ({grown['min']:.2f}–{grown['max']:.2f})",
                    f"{1e3 * found['predicted_seconds']:.1f}",
                    f"{found['fraction_of_floor']:.0%}",
                    f"{found['of_ceiling']:.2f}" if "of_ceiling" in found else "–",
                ]
            table.add_row(*cells, "/".join(f"{b / 1e6:.1f}" for b in row["peak_bytes"].values()))
        console.print(table)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Measured speed-ups of single matrices against what was kept, beside the ceiling 1 / keep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in result["linears"] if r["rank"]]
    kinds = sorted({(r["dtype"], tuple(r["shape"])) for r in rows})
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.2), sharey=True, squeeze=False)
    for ax, (dtype, shape) in zip(axes[0], kinds, strict=True):
        for tokens, marker in zip(sorted({r["tokens"] for r in rows}), "o^sD", strict=False):
            mine = [r for r in rows if (r["dtype"], tuple(r["shape"]), r["tokens"]) == (dtype, shape, tokens)]
            ax.plot([r["kept"] for r in mine], [r["speedup"]["median"] for r in mine], marker, label=f"{tokens} tokens")
        kept = [0.45 + 0.005 * i for i in range(80)]
        ax.plot(kept, [1 / k for k in kept], color="0.4", linewidth=1, label="1 / kept")
        ax.axhline(1, color="0.7", linewidth=0.8)
        ax.set(title=f"{shape[0]}×{shape[1]}, {dtype}", xlabel="parameters kept")
    axes[0][0].set_ylabel("times as fast as dense")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
