"""The account of a structured run: what became of every matrix, and how the result is described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corank.account import compose
from corank.order import Order
from corank.report import Report
from corank.structured.block import Narrowed
from corank.structured.convolutions import Folded
from corank.structured.native import Native
from corank.structured.plan import Plan
from corank.structured.residual import Sliced
from corank.structured.shape import matrix_after, rank_after, shape_of_block
from corank.structured.task import Task


@dataclass(frozen=True)
class Outcome:
    """What a run has led to, for the report.

    Attributes:
        plan: as carried out.
        narrowed: what became of each block that was narrowed, by its number in the source.
        described: the configuration of the result.
        parameters: of the whole result.
        sliced: what became of the residual stream, None if it is as it was.
        folded: what became of the channels of convolutions, None if there are none to fold.
    """

    plan: Plan
    narrowed: Mapping[int, Narrowed]
    described: Native
    parameters: int
    sliced: Sliced | None = None
    folded: Folded | None = None


def report_of(name: str, order: Order, task: Task, outcome: Outcome, peak: int | None) -> Report:
    """The report of a run, before sizes on disk are known."""
    plan, described = outcome.plan, outcome.described
    sizes = outcome.sliced or (None if outcome.folded is None else Sliced(0, outcome.folded.sizes, None))
    rows = rows_of(task, plan, outcome.narrowed, sizes)
    warnings: list[str] = []
    if not plan.selection.removed and all(row["kind"] == "dense" for row in rows):
        warnings.append("Every block stayed as it was: the budget asks for nothing.")
    warnings += plan.skipped
    if described.kind not in ("N0", "N1"):
        warnings.append(f"Loading it needs corank: {described.why}.")
    elif described.config.model_type != task.source.config.model_type:
        warnings.append(
            f"It is written as a {described.config.model_type} model, which computes the same: the configuration of "
            f"{task.source.config.model_type} cannot say its widths."
        )
    structure: dict[str, Any] = {
        "class": described.kind,
        "kept": list(plan.kept),
        "removed": list(plan.selection.removed),
        "merged": {str(i): {str(j): share for j, share in mix.items()} for i, mix in plan.selection.mixes.items()},
        "blocks": [width.to_dict() for width in plan.widths],
    }
    if outcome.sliced is not None:
        structure["hidden_size"] = outcome.sliced.width
        if outcome.sliced.kept is not None:
            structure["energy"] = outcome.sliced.kept
        structure |= {"residual": list(outcome.sliced.widths)} if outcome.sliced.widths else {}
    if outcome.folded is not None:
        structure["folded"] = [{"made_by": name, "before": b, "after": a} for name, b, a in outcome.folded.groups]
    return compose(
        name,
        order,
        rows,
        task.source,
        data=task.data,
        dtype=task.dtype,
        parameters=outcome.parameters,
        stages=dict(task.stages),
        peak_memory_bytes=peak,
        warnings=warnings,
        extra={"structure": structure},
    )


def rows_of(
    task: Task,
    plan: Plan,
    narrowed: Mapping[int, Narrowed],
    sliced: Sliced | None = None,
) -> list[dict[str, Any]]:
    """One row per matrix of the source.

    Args:
        task: what was to be done.
        plan: what becomes of every block.
        narrowed: what is known of the blocks that have been narrowed, by their numbers in the source.
        sliced: sizes of every matrix, where they do not follow from the plan, and maps beside them.
    """
    rows: list[dict[str, Any]] = []
    gone_into = {j: i for i, mix in plan.selection.mixes.items() for j in mix if j != i}
    number = {old: new for new, old in enumerate(plan.kept)}
    for layer in range(task.layers):
        sites = task.sites(layer)
        target = plan.widths[number[layer]] if plan.widths and layer in number else None
        before = shape_of_block(task.source.config, sites) if target is not None else None
        for site in sites:
            after = (0, 0) if layer not in number else site.shape
            extra, rank = 0, None
            if target is not None and before is not None:
                after = matrix_after(site, before, target)
                extra = after[0] if task.source.outline.local(site) in target.biases else 0
                rank = rank_after(site, target)
            if sliced is not None:
                after, extra = sliced.sizes[site.name], sliced.beside.get(site.name, 0)
            kind = "merged" if layer in gone_into else "removed" if layer not in number else "dense"
            if layer in number and (after != site.shape or extra):
                kind = "narrow"
            if rank is not None:
                kind = "low_rank"
            losses = narrowed[layer].losses if layer in narrowed else {}
            size = after[0] * after[1] if rank is None else rank * sum(after)
            rows.append(
                {
                    "name": site.name,
                    "role": site.role,
                    "layer": site.block,
                    "shape": list(site.shape),
                    "kind": kind,
                    "rank": min(after) if rank is None else rank,
                    "max_rank": min(site.shape),
                    "params": size + extra,
                    "params_dense": site.numel,
                    "flops_dense": site.flops,
                    "flops": round(2 * (size + (0 if sliced is None else extra)) * site.share),
                    "loss": 0.0 if kind == "dense" and task.recipe.learn is None else losses.get(site.name),
                    "becomes": {"layer": number.get(layer), "shape": list(after)},
                }
            )
    return rows
