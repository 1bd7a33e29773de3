"""Rebuild what is generated: docs/methods.md, and the tables in README.md between their markers.

./dev docs            rebuild
./dev docs --check    exit with 1 if something is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from corank import recipe

ROOT = Path(__file__).resolve().parent.parent


def methods_page() -> str:
    """docs/methods.md, from the registry."""
    parts = [
        "# Methods\n",
        "Generated from the registry by `./dev docs`. `corank methods NAME` prints the same.\n",
        methods_table(),
    ]
    for method in recipe.methods():
        parts.append(f"\n## {method.name}\n\n*{method.family}, {method.cite}*\n\n```text\n{method.doc}\n```\n")
    return "\n".join(parts)


def methods_table() -> str:
    """One row per method."""
    rows = ["| method | what it does | source | parameters |", "|---|---|---|---|"]
    for m in recipe.methods():
        parameters = ", ".join(f"`{k}={_plain(v)}`" for k, v in m.parameters.items())
        rows.append(f"| `{m.name}` | {m.summary} | {m.cite} | {parameters} |")
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
    hardware = data["hardware"]
    windows = data["windows"] or "all"
    lines.append(
        f"\n{data['model']}; calibration {data['calibration']['samples']} × {data['calibration']['length']} tokens of WikiText-2 "
        f"validation; {windows} evenly spaced windows of {data['window']} tokens; {hardware['processor']}, {hardware['threads']} threads."
    )
    return "\n".join(lines)


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
    return "\n".join(lines)


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between <!-- name --> and <!-- /name -->."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def main() -> int:
    """Write, or with --check compare."""
    readme = (ROOT / "README.md").read_text()
    wanted = {
        ROOT / "docs" / "methods.md": methods_page(),
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
