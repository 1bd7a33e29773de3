"""The account of a run: four numbers before and after, one row per site."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import torch
import transformers

from corank.budget import count_break_even
from corank.engine.job import Job
from corank.engine.passes import Result
from corank.engine.store import torch_dtype_name
from corank.factors import KINDS
from corank.model import Outline
from corank.order import Order
from corank.recipe import Recipe
from corank.report import Report

VERSION = "0.1.0"


def make_report(name: str, order: Order, result: Result, job: Job, peak: int | None) -> Report:
    """The report of a run, before sizes on disk are known."""
    rows, outline = result.rows, job.source.outline
    inside = sum(r["params_dense"] for r in rows)
    after = sum(r["params"] for r in rows)
    every_flop = outline.flops
    saved_flops = sum(r["flops_dense"] - r["flops"] for r in rows)
    rows_by_loss = [r for r in rows if r["kind"] != "dense"]
    warnings = []
    if not rows_by_loss:
        warnings.append("Every site stayed dense: the budget asks for nothing, or factors would not be smaller.")
    accounting = {
        "sites": {"dense": inside, "compressed": after},
        "model": {"dense": outline.parameters, "compressed": outline.parameters - inside + after},
        "flops_per_token": {"dense": every_flop, "compressed": every_flop - saved_flops},
        "break_even": _break_even(job.recipe, outline),
    }
    return Report(
        model=name,
        method=order.method,
        corank=VERSION,
        parameters={k: list(v) if isinstance(v, tuple) else v for k, v in order.settings.items()},
        budget=order.budget.to_dict() if order.budget else {},
        accounting=accounting,
        sites=rows,
        stages=dict(job.stages),
        peak_memory_bytes=peak,
        seed=order.seed,
        data={**job.data.source, "batch": order.batch} if job.data else {},
        versions={
            "corank": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": torch_dtype_name(job.dtype),
            "compute_dtype": torch_dtype_name(job.source.dtype),
        },
        warnings=warnings,
        extra={} if result.distances is None else {"angular_distances": result.distances},
    )


def _break_even(recipe: Recipe, outline: Outline) -> dict[str, int]:
    """For each role, the largest rank at which the stored kind is smaller than the dense matrix."""
    shapes = {s.role: s.shape for s in outline.sites}
    return {role: count_break_even(shape, KINDS[recipe.kind][0].count) for role, shape in shapes.items()}


def with_bytes(report: Report, directory: Path, outline: Outline, dtype: torch.dtype) -> Report:
    """Add the bytes on disk: of the safetensors files written, and of the dense model in the same dtype."""
    written = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    accounting = {**report.accounting, "bytes": {"dense": outline.parameters * dtype.itemsize, "compressed": written}}
    return dataclasses.replace(report, accounting=accounting)
