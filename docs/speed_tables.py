"""The tables and the picture of docs/speed.md: predictions from the time model, measurements from benchmarks/results.

python docs/speed_tables.py        # draws docs/pictures/break_even.png; `./dev docs` fills the tables
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from corank.budget import Choice, Plan
from corank.timing import PRESETS, RUNTIMES, Device, anatomy, break_even_rank, break_even_size, matrix_seconds, predict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "pictures" / "break_even.png"
NOT_YET = "*Not yet measured.*"
KEEPS = (0.8, 0.6, 0.5)
MATRICES = (
    ("Llama-3.1-8B k, v", (1024, 4096)),
    ("Llama-3.1-8B q, o", (4096, 4096)),
    ("Llama-3.1-8B gate, up", (14336, 4096)),
    ("a 70B model's q, o", (8192, 8192)),
)


def rank_at(shape: tuple[int, int], keep: float, device: Device) -> int:
    """The largest rank within a share of the parameters that suits the device."""
    m, n = shape
    return int(keep * m * n / (m + n)) // device.quantum * device.quantum


def break_even_table() -> str:
    """Single matrices in decoding: how fast two launches are, and up to which rank they pay."""
    device = PRESETS["h200"]
    lines = [
        "| matrix | out × in | keep 0.8 | 0.6 | 0.5 | faster up to rank | which keeps |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, shape in MATRICES:
        dense = matrix_seconds(shape, None, device)
        speed = [dense / matrix_seconds(shape, rank_at(shape, keep, device), device) for keep in KEEPS]
        rank = break_even_rank(shape, device)
        kept = "–" if rank is None else f"{rank * sum(shape) / (shape[0] * shape[1]):.0%}"
        cells = " | ".join(f"{s:.2f}×" for s in speed)
        lines.append(f"| {name} | {shape[0]} × {shape[1]} | {cells} | {rank or 'none'} | {kept} |")
    return "\n".join(lines)


def tiers_table() -> str:
    """A whole step of Llama-3.1-8B in every runtime."""
    device = PRESETS["h200"]
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    dense = anatomy(LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256))
    small = {}
    for keep in KEEPS:
        ranks = {s.name: Choice("low_rank", rank_at(s.shape, keep, device)) for s in dense.inside()}
        small[keep] = anatomy(dense, Plan(ranks, "", 0, 0))
    lines = ["| runtime | dense ms | keep 0.8 | 0.6 | 0.5 |", "|---|---:|---:|---:|---:|"]
    for name in RUNTIMES:
        before = predict(dense, device, runtime=name).seconds
        steps = [predict(small[keep], device, runtime=name).seconds for keep in KEEPS]
        cells = " | ".join(f"{1e3 * s:.1f} ({before / s:.2f}×)" for s in steps)
        lines.append(f"| {name} | {1e3 * before:.1f} | {cells} |")
    floor = predict(dense, device, runtime="packed").floor
    floors = [predict(small[keep], device, runtime="packed").floor for keep in KEEPS]
    cells = " | ".join(f"{1e3 * s:.1f} ({floor / s:.2f}×)" for s in floors)
    lines.append(f"| *bytes alone* | {1e3 * floor:.1f} | {cells} |")
    return "\n".join(lines)


def measured(pattern: str) -> list[dict[str, Any]]:
    """Results of a benchmark that are worth quoting: no trial at toy sizes."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob(pattern))]
    return [data for data in found if not (data.get("quick") or data.get("toy") or data.get("dry_run"))]


def conditions(data: dict[str, Any]) -> str:
    """On what it was measured."""
    where = data["hardware"]
    threads = "" if where.get("gpu") else f", {where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    return f"{where.get('gpu') or where['processor']}{threads}, torch {where['torch']}"


def linears_table() -> str:
    """Single matrices on processors."""
    parts = []
    for data in measured("speed-*.json"):
        if data["hardware"].get("gpu") or "linears" not in data:
            continue
        tokens = sorted({row["tokens"] for row in data["linears"]})
        heads = " | ".join(f"{t} token{'s' if t > 1 else ''}" for t in tokens)
        lines = [f"{conditions(data)}: times as fast as dense, predicted in brackets.\n"]
        lines += [f"| out × in | dtype | | {heads} |", "|---|---|---|" + "---:|" * len(tokens)]
        for key in dict.fromkeys((tuple(r["shape"]), r["dtype"], r["variant"]) for r in data["linears"]):
            rows = [r for r in data["linears"] if (tuple(r["shape"]), r["dtype"], r["variant"]) == key]
            if rows[0]["rank"] is not None:
                cells = [f"{r['speedup']['median']:.2f} ({r['predicted_speedup']:.2f})" for r in rows]
                lines.append(f"| {key[0][0]} × {key[0][1]} | {key[1]} | {key[2]} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_YET


def chunked_table() -> str:
    """One MLP over chunks of tokens on processors."""
    parts = []
    for data in measured("speed-*.json"):
        rows = data.get("chunked")
        if not rows:
            continue
        lines = [f"{conditions(data)}: {rows[0]['model']}, {rows[0]['tokens']} tokens.\n"]
        lines += [
            "| | peak of activations | of unfused | times as fast as unfused | as dense |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in rows:
            cells = f"{1 - row['peak_saved']:.0%} | {row['speedup_over_unfused']['median']:.2f} | {row['speedup']['median']:.2f}"
            lines.append(f"| {row['variant']} | {row['peak_bytes'] / 1e6:.1f} MB | {cells} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_YET


def models_table() -> str:
    """Whole models on processors."""
    parts = []
    for data in measured("speed-*.json"):
        if data["hardware"].get("gpu") or "models" not in data:
            continue
        lines = [
            f"{conditions(data)}, keep {data['keep']}: times as fast as dense eager; of 1 / keep: without the output matrix.\n"
        ]
        lines += [
            "| model | batch | | prefill | of floor | of 1 / keep | decode | of floor | of 1 / keep | peak, prefill |"
        ]
        lines += ["|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"]
        for row in data["models"]:
            cells = []
            for mode in ("prefill", "decode"):
                found = row.get(mode)
                cells += (
                    ["–", "–", "–"]
                    if found is None
                    else [
                        f"{found['speedup']['median']:.2f}",
                        f"{found['fraction_of_floor']:.0%}",
                        f"{found['of_ceiling']:.2f}" if "of_ceiling" in found else "–",
                    ]
                )
            peak = f"{row['peak_bytes']['prefill'] / 1e6:.1f} MB"
            lines.append(f"| {row['model']} | {row['batch']} | {row['variant']} | {' | '.join(cells)} | {peak} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_YET


def gpu_table() -> str:
    """Decoding steps on GPUs, against the fastest dense variant of the same run."""
    parts = []
    for data in measured("speed-*.json"):
        rows = data.get("decode")
        if not data["hardware"].get("gpu") or not isinstance(rows, list):
            continue
        lines = [f"{conditions(data)}: times as fast as the fastest dense variant of the same run.\n"]
        lines += ["| model | keep | batch | context | | ms | speed-up | predicted ms | of floor |"]
        lines += ["|---|---:|---:|---:|---|---:|---:|---:|---:|"]
        for row in (r for r in rows if "error" not in r):
            cells = f"{1e3 * row['seconds']['median']:.2f} | {row['speedup_over_best_dense']:.2f}× "
            cells += f"| {1e3 * row['predicted_seconds']:.2f} | {row['fraction_of_floor']:.0%}"
            lines.append(
                f"| {row['model']} | {row['keep']} | {row['batch']} | {row['context']} | {row['variant']} | {cells} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_YET


def compress_table() -> str:
    """How long compression takes."""
    parts = []
    for data in measured("compress-speed-*.json"):
        lines = [f"{conditions(data)}, random weights.\n"]
        lines += ["| shape | method | layers run | tokens | calibration | factorization | matrices |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|"]
        for row in data["rows"]:
            cells = []
            for name in ("calibration", "factorization"):
                whole = row.get(f"extrapolated_{name}_seconds")
                extra = "" if whole is None else f" (extrapolated to all: {whole:.0f} s)"
                cells.append(f"{row[f'{name}_seconds']:.1f} s{extra}")
            ran = f"{row['layers']} of {row['layers_of_the_model']}"
            tokens = row["samples"] * row["length"]
            lines.append(
                f"| {row['shape']} | `{row['method']}` | {ran} | {tokens} | {' | '.join(cells)} | {row['matrices']} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_YET


def sections() -> dict[str, str]:
    """Marker in docs/speed.md -> what stands between."""
    return {
        "break-even": break_even_table(),
        "tiers": tiers_table(),
        "linears": linears_table(),
        "chunked": chunked_table(),
        "models": models_table(),
        "gpu": gpu_table(),
        "compression": compress_table(),
    }


def draw(path: Path, device: Device, keeps: Sequence[float] = (0.8, 0.6, 0.5, 0.4)) -> None:
    """Speed-up of one square matrix in decoding against its size, for several shares kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#0072B2", "#009E73", "#D55E00", "#CC79A7")
    figure, ax = plt.subplots(figsize=(7.2, 4.2))
    sides = [64 * i for i in range(8, 257)]
    for keep, colour in zip(keeps, colours, strict=True):
        speed = []
        for side in sides:
            m, n = side, side
            exact = keep * m * n / (m + n)  # no rounding: the line is of the share kept, not of the multiples of a rank
            ratio = exact / max(int(exact), 1)
            seconds = (matrix_seconds((m, n), int(exact), device) - 2 * device.kernel_s) * ratio + 2 * device.kernel_s
            speed.append(matrix_seconds((m, n), None, device) / seconds)
        millions = [side * side / 1e6 for side in sides]
        ax.plot(millions, speed, color=colour, linewidth=2)
        start = break_even_size(keep, device) / 1e6
        label = f"keep {keep:g},\nfrom {start:.0f} million"
        end = (millions[-1], speed[-1])
        ax.annotate(label, end, xytext=(6, 0), textcoords="offset points", va="center", color=colour, fontsize=9)
        ax.plot([start], [1], "o", color=colour, markersize=6, zorder=3)
    ax.axhline(1, color="0.35", linewidth=1)
    ax.set(xscale="log", xlabel="entries of the matrix, millions", ylabel="times as fast as dense")
    ax.set_title(
        f"Two launches pay from a size on: decoding at batch 1, {device.name}\n"
        f"(predicted: {device.bytes_per_s / 1e12:g} TB/s, {1e6 * device.kernel_s:g} µs a launch)",
        fontsize=11,
        loc="left",
    )
    ticks = [1, 4, 16, 64, 256]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    for x, label in ((1024 * 4096, "8B: k, v"), (4096 * 4096, "8B: q, o"), (14336 * 4096, "8B: gate, up, down")):
        ax.axvline(x / 1e6, color="0.85", linewidth=1, zorder=0)
        ax.annotate(label, (x / 1e6, 2.62), rotation=90, fontsize=8, color="0.45", ha="right", va="top")
    ax.set_ylim(0.5, 2.7)
    ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    draw(PICTURE, PRESETS["h200"])
    print(f"wrote {PICTURE.relative_to(ROOT)}")
