"""Rebuild what is generated: docs/methods.md, docs/leaderboard.md, the tables in docs/speed.md and README.md.

./dev docs            rebuild
./dev docs --check    exit with 1 if something is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from speed_tables import sections

from corank import recipe
from corank.adaptation import adapters

ROOT = Path(__file__).resolve().parent.parent


def methods_page() -> str:
    """docs/methods.md, from the registry."""
    parts = [
        "# Methods\n",
        "Generated from the registry by `./dev docs`. `corank methods NAME` prints the same.\n",
        methods_table(),
    ]
    for method in everything():
        parts.append(f"\n## {method.name}\n\n*{method.family}, {method.cite}*\n\n```text\n{method.doc}\n```\n")
    return "\n".join(parts)


def everything() -> list[Any]:
    """All methods, family by family."""
    return [*recipe.methods(family="weights"), *recipe.methods(family="structured"), *adapters().values()]


def methods_table() -> str:
    """One row per method."""
    rows = ["| method | family | what it does | source | parameters |", "|---|---|---|---|---|"]
    for m in everything():
        parameters = ", ".join(f"`{k}={_plain(v)}`" for k, v in m.parameters.items())
        rows.append(f"| `{m.name}` | {m.family} | {m.summary} | {m.cite} | {parameters} |")
    return "\n".join(rows)


def _plain(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def quality_table() -> str:
    """Perplexities, from benchmarks/results/quality.json."""
    file = ROOT / "benchmarks" / "results" / "quality.json"
    if not file.is_file():
        return "*not measured yet*"
    data = json.loads(file.read_text())
    lines = [
        "| method | parameters kept in the decoder | WikiText-2 test | ratio to dense | OpenWebText | ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        if "error" in row:
            continue
        sites = row.get("accounting", {}).get("sites", {"compressed": 1, "dense": 1})
        options = ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in row["options"].items())
        label = f"`{row['method']}`" + (f" ({options})" if options else "")
        test, other = row["perplexity"]["test"]["value"], row["perplexity"]["other"]["value"]
        lines.append(
            f"| {label} | {sites['compressed'] / sites['dense']:.1%} | {test:,.1f} | {row['ratio']['test']:,.2f}× "
            f"| {other:,.1f} | {row['ratio']['other']:,.2f}× |"
        )
    lines.append("\n" + _conditions(data))
    return "\n".join(lines)


def leaderboard_page() -> str:
    """docs/leaderboard.md, from benchmarks/results/leaderboard*.json."""
    parts = [
        "# Leaderboard\n",
        "Every registered method that makes a smaller model, on one model with the same calibration tokens, closed form, nothing "
        "trained afterwards unless "
        "the name says so. Sorted by the perplexity outside the calibration domain, which is what a user meets. Lower is better, 1 is the dense "
        "model. `./dev bench leaderboard` fills the table one cell at a time and goes on where it was interrupted; `--quick` is the short form.\n",
    ]
    for name, title in (("leaderboard", "Full"), ("leaderboard-quick", "Quick")):
        file = ROOT / "benchmarks" / "results" / f"{name}.json"
        if file.is_file():
            parts += [f"## {title}\n", leaderboard_table(json.loads(file.read_text()))]
            if file.with_suffix(".png").is_file():
                parts.append(f"\n![Perplexity against size](../benchmarks/results/{name}.png)\n")
    return "\n".join(parts)


def leaderboard_table(data: dict[str, Any]) -> str:
    """One table for each share of the parameters kept."""
    lines = [_conditions(data) + "\n"]
    titles = {k: _title(v["text"]) for k, v in data["texts"].items()}
    rows = [r for r in data["rows"] if r["method"] != "dense"]
    for keep in sorted({r["budget"]["keep"] for r in rows}, reverse=True):
        cells = [r for r in rows if r["budget"]["keep"] == keep]
        lines += [
            f"### {keep:.0%} of the decoder's parameters\n",
            f"| method | kept | {titles['test']} | {titles['other']} | seconds | peak memory | class |",
            "|---|---:|---:|---:|---:|---:|---|",
        ]
        for row in sorted((r for r in cells if "error" not in r), key=lambda r: r["ratio"]["other"]):
            sites = row["accounting"]["sites"]
            lines.append(
                f"| `{row['method']}` | {sites['compressed'] / sites['dense']:.1%} | {_times(row['ratio']['test'])} "
                f"| {_times(row['ratio']['other'])} | {sum(row['stages'].values()):.0f} | {row['peak_memory_bytes'] / 1e9:.1f} GB "
                f"| {row.get('class') or 'factors'} |"
            )
        lines += [f"| `{r['method']}` | {r['error'].split(': ', 1)[-1]} | | | | | |" for r in cells if "error" in r]
        lines.append("")
    lines.append(
        "Seconds are those of the stages of one run that finds the statistics of earlier runs in its cache. Classes are those of "
        "[structured.md](structured.md): N0 and N1 are plain checkpoints of smaller models."
    )
    return "\n".join(lines)


def _title(source: str) -> str:
    """What a text is called in a table."""
    known = {
        "wikitext2": "WikiText-2",
        "openwebtext": "web text",
        "builtin-test": "technical prose",
        "builtin-code": "Python code",
    }
    return next((title for word, title in known.items() if word in source), source)


def _times(ratio: float) -> str:
    return f"{ratio:.3f}×" if ratio < 10 else f"{ratio:,.0f}×"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _conditions(data: dict[str, Any]) -> str:
    calibration, hardware = data["calibration"], data["hardware"]
    return (
        f"{data['model']}; calibration {calibration['samples']} × {calibration['length']} tokens of {_title(calibration['text'])}; "
        f"{data['windows'] or 'all'} evenly spaced windows of {data['window']} tokens; {hardware['processor']}, {_threads(hardware['threads'])}."
    )


def speed_lines() -> str:
    """Factorization and memory, from their results."""
    results, lines = ROOT / "benchmarks" / "results", []
    if (results / "factorization-model.json").is_file():
        data = json.loads((results / "factorization-model.json").read_text())
        routes = data["whole_model"]["routes"]
        mixed = routes["mixed"]
        lines.append(
            f"- `svd-llm` on the {data['whole_model']['matrices']} matrices of a 135M model: {mixed['wall_speedup']:.1f} times as fast as the "
            f"direct route (Cholesky, explicit inverse, SVD) in the same run, {routes['double']['wall_speedup']:.1f} times in full float64; "
            f"total loss {mixed['loss_over_optimum']:.6f} of the optimum ({data['hardware']}, {data['threads']} thread)."
        )
    if (results / "factorization-cur.json").is_file():
        data = json.loads((results / "factorization-cur.json").read_text())
        fast, (m, n) = data["fast_cur"]["routes"]["cur-fast"], data["fast_cur"]["shape"]
        lines.append(
            f"- `cur-fast` on {m} × {n} at rank {data['fast_cur']['rank']}: {fast['column_id_seconds']:.1f} s, "
            f"{fast['column_id_speedup']:.0f} times as fast as full SVD with Q-DEIM, at {fast['column_id_error_ratio']:.2f} times its error."
        )
    if (results / "memory.json").is_file():
        data = json.loads((results / "memory.json").read_text())
        lines.append(
            f"- A random model of {data['model_bytes'] / 1e9:.1f} GB compressed with `{data['method']}`: peak "
            f"{data['peak_bytes'] / 1e9:.2f} GB, of which {data['import_bytes'] / 1e9:.2f} GB is importing PyTorch and transformers; the rest is "
            f"{data['share_of_model']:.0%} of the model."
        )
    if (results / "artefact.json").is_file():
        lines += artefact_lines(json.loads((results / "artefact.json").read_text()))
    return "\n".join(lines)


def artefact_lines(data: dict[str, Any]) -> list[str]:
    """What a compressed model is like to use, from benchmarks/results/artefact.json."""
    lines = []
    if "memory" in data:
        found = ", ".join(
            f"{r['peak_bytes'] / 1e9:.2f} GB for {r['model_bytes'] / 1e9:.2f} GB" for r in data["memory"]["rows"]
        )
        lines.append(
            f"- Peak memory of compressing random models of one, two and four times as many blocks (`{data['memory']['method']}`): {found}."
        )
    if "load" in data:
        load, seconds = data["load"], {k: v["median"] for k, v in data["load"]["seconds"].items()}
        lines.append(
            f"- Loading a model at {load['keep']:.0%}, its digests checked, from the page cache: {seconds['small']:.2f} s where the dense one takes "
            f"{seconds['dense']:.2f} s ({load['bytes']['small'] / 1e6:.0f} MB against {load['bytes']['dense'] / 1e6:.0f} MB)."
        )
    if "speed" in data:
        row = data["speed"]["rows"][-1]
        torch_, onnx = (row[f"{engine} small to dense"]["median"] for engine in ("torch", "onnxruntime"))
        lines.append(
            f"- Tokens/s of that model over the dense one, {row['batch']} × {row['length']} tokens, float32: {torch_:.2f} in PyTorch, "
            f"{onnx:.2f} in ONNX Runtime (medians of paired repeats)."
        )
    return lines


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between <!-- name --> and <!-- /name -->."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def main() -> int:
    """Write, or with --check compare."""
    readme = (ROOT / "README.md").read_text()
    speed = (ROOT / "docs" / "speed.md").read_text()
    for name, content in sections().items():
        speed = fill(speed, name, content)
    wanted = {
        ROOT / "docs" / "speed.md": speed,
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "docs" / "leaderboard.md": leaderboard_page(),
        ROOT / "README.md": fill(
            fill(fill(readme, "methods", methods_table()), "quality", quality_table()), "speed", speed_lines()
        ),
    }
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run ./dev docs")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
