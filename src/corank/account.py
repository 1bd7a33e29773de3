"""The account of a run: four numbers before and after, one row per site."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from corank.budget import count_break_even
from corank.engine.job import Job
from corank.engine.narrowing import structure_of
from corank.engine.passes import Result
from corank.engine.store import torch_dtype_name
from corank.factors import KINDS
from corank.model import Calibration, Outline, ResidentModel
from corank.order import Order
from corank.recipe import Recipe, get
from corank.report import Report
from corank.report.card import write_card
from corank.timing import PAYS, Clock

VERSION = "0.1.0"


def make_report(name: str, order: Order, result: Result, job: Job, peak: int | None) -> Report:
    """The report of a run, before sizes on disk are known."""
    warnings = []
    if all(row["kind"] == "dense" for row in result.rows):
        warnings.append("Every site stayed dense: the budget asks for nothing, or factors would not be smaller.")
    latency = None if job.clock is None else _latency(result, job, job.clock)
    if latency is not None and job.clock is not None and latency["speedup"] < PAYS:
        grown = f"{latency['speedup']:.2f} times as fast ({job.clock.describe()})"
        warnings.append(f"Memory only: the matrices are predicted to be {grown}.")
    structure = structure_of(job, result.plan)
    if structure:
        warnings.append("Loading it needs corank: its blocks have different widths.")
    report = compose(
        name,
        order,
        result.rows,
        job.source,
        data=job.data,
        dtype=job.dtype,
        parameters=_parameters(job, result) if structure else None,
        stages=dict(job.stages),
        peak_memory_bytes=peak,
        break_even=_break_even(job.recipe, job.source.outline),
        warnings=warnings,
        extra={**structure, **({} if result.distances is None else {"angular_distances": result.distances})},
    )
    if latency is None:
        return report
    return dataclasses.replace(report, accounting={**report.accounting, "latency": latency})


def _parameters(job: Job, result: Result) -> int:
    """Parameters of a result with narrower blocks: biases become shorter too, which rows of matrices do not say."""
    saved = sum(r["params_dense"] - r["params"] for r in result.rows)
    biased = {s.name for s in job.sites if s.bias}
    rows = [r for r in result.rows if r["name"] in biased and "becomes" in r]
    return job.source.outline.parameters - saved - sum(r["shape"][0] - r["becomes"]["shape"][0] for r in rows)


def compose(
    name: str,
    order: Order,
    rows: list[dict[str, Any]],
    source: ResidentModel,
    *,
    data: Calibration | None,
    dtype: torch.dtype,
    parameters: int | None = None,
    break_even: Mapping[str, int] | None = None,
    **rest: Any,
) -> Report:
    """A report from its rows.

    Args:
        name: of the model.
        order: what was asked for.
        rows: one per site.
        source: the dense model.
        data: calibration data.
        dtype: of what is stored.
        parameters: of the whole result, where it lost more than matrices; None: counted from the rows.
        break_even: role -> largest rank that saves anything.
        rest: fields of the report as they are.
    """
    outline = source.outline
    inside = sum(r["params_dense"] for r in rows)
    after = sum(r["params"] for r in rows)
    every_flop = outline.flops
    saved_flops = sum(r["flops_dense"] - r["flops"] for r in rows)
    accounting = {
        "sites": {"dense": inside, "compressed": after},
        "model": {
            "dense": outline.parameters,
            "compressed": outline.parameters - inside + after if parameters is None else parameters,
        },
        "flops_per_token": {"dense": every_flop, "compressed": every_flop - saved_flops},
        "break_even": dict(break_even or {}),
    }
    return Report(
        model=name,
        method=order.method,
        corank=VERSION,
        parameters={k: list(v) if isinstance(v, tuple) else v for k, v in order.settings.items()},
        budget=order.budget.to_dict() if order.budget else {},
        accounting=accounting,
        sites=rows,
        seed=order.seed,
        data={**data.source, "batch": order.batch} if data else {},
        versions={
            "corank": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": torch_dtype_name(dtype),
            "compute_dtype": torch_dtype_name(source.dtype),
        },
        **rest,
    )


def _latency(result: Result, job: Job, clock: Clock) -> dict[str, Any]:
    """Predicted nanoseconds of the sites, before and after, and for what."""
    choices = result.plan.choices
    before = sum(clock.nanoseconds(s, "dense", None) for s in job.sites)
    after = 0
    for site in job.sites:
        choice = choices[site.name]
        after += clock.nanoseconds(site, choice.kind, None if choice.is_dense else choice.rank)
    return {
        "dense": before,
        "compressed": after,
        "speedup": before / after,
        "batch": clock.batch,
        "tokens": clock.tokens,
        "device": clock.device.to_json(),
        "multiple_of": job.recipe.multiple_of,
    }


def _break_even(recipe: Recipe, outline: Outline) -> dict[str, int]:
    """For each role, the largest rank at which the stored kind is smaller than the dense matrix."""
    shapes = {s.role: s.shape for s in outline.sites}
    return {role: count_break_even(shape, KINDS[recipe.kind][0].count) for role, shape in shapes.items()}


def with_bytes(report: Report, directory: Path, outline: Outline, dtype: torch.dtype) -> Report:
    """Add the bytes on disk: of the safetensors files written, and of the dense model in the same dtype."""
    written = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    accounting = {**report.accounting, "bytes": {"dense": outline.parameters * dtype.itemsize, "compressed": written}}
    return dataclasses.replace(report, accounting=accounting)


def document(report: Report, directory: Path) -> None:
    """Write the report, and the model card made from it."""
    report.save(directory / "report.json")
    write_card(report, directory / "README.md", cite=get(report.method).cite)


def provenance(order: Order, report: Report, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about where it comes from, as keywords of `corank.checkpoint.attach`."""
    return {
        "recipe": {"method": order.method, "parameters": report.parameters, "budget": report.budget},
        "plan": dict(plan),
        "provenance": {"seed": order.seed, "data": report.data, "versions": report.versions, "model": report.model},
    }
