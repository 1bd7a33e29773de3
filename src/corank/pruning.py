"""prune(): a smaller model out of a directory with a score map, in seconds, without data and without training."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from corank import checkpoint
from corank.account import document
from corank.api import check_target, load
from corank.budget import Budget, Choice, Plan
from corank.checkpoint.config import CorankConfig
from corank.errors import CorankError
from corank.factors import replace, weight_of
from corank.gates.any_size import Map, UnitMap, load_map
from corank.gates.scores import Costs
from corank.model import resolve
from corank.order import Order
from corank.recipe import get
from corank.report import Report
from corank.structured.any_units import FromMap
from corank.structured.driver import compress_resident

SIZES = ("keep", "remove", "params", "bytes")


def prune(
    model: str | Path,
    *,
    out: str | Path,
    keep: float | str | None = None,
    remove: float | str | None = None,
    params: int | str | None = None,
    bytes: int | str | None = None,
    scope: str | None = None,
    uniform: bool | None = None,
) -> Report:
    """Write a smaller model than one that was compressed with a score map (``--method acip`` or ``acip-units``).

    The components with the lowest scores of all matrices go, or the channels and heads with the lowest scores. The result
    has a score map as well, so that it can be pruned again: first to 0.8 and then to 0.6 is the same as to 0.6 at once.

    Args:
        model: a directory with a score map.
        out: directory to write, absent or empty.
        keep, remove, params, bytes: the size, exactly one of them, relative to the dense model that all was made from.
        scope: what the size is counted over, as in `corank.compress`.
        uniform: of channels and heads, the same widths in all blocks; None: as the directory was made.

    Returns:
        the report, which has also been written to ``out/report.json``.

    Raises:
        CorankError: no score map; a size larger than the directory's own, or smaller than what has to stay; `out` is not
            empty. Nothing has been written.
    """
    started, target, source = time.perf_counter(), check_target(out), resolve(model)
    stored = load_map(source)
    if not (source / "report.json").is_file():
        raise CorankError(f"{source} has no report.json, which says how large the dense model was; make it again.")
    before = Report.load(source / "report.json")
    given = {"keep": keep, "remove": remove, "params": params, "bytes": bytes}
    size = params is not None or bytes is not None
    budget = Budget.parse(**given, scope=scope or ("model" if size else "sites"))
    stage = target.with_name(target.name + ".pruned")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        if isinstance(stored, UnitMap):
            report = _units(stored, source, before, budget, uniform, stage)
        else:
            if uniform is not None:
                raise CorankError("uniform is for channels and heads, and this directory holds components of matrices.")
            report = _components(stored, source, before, budget, stage)
        report = dataclasses.replace(report, stages={"prune": time.perf_counter() - started})
        document(report, stage)
        if (source / "recipe.yaml").is_file():
            run = yaml.safe_load((source / "recipe.yaml").read_text())
            run = {k: v for k, v in run.items() if k not in (*SIZES, "scope")} | dict(report.budget)
            (stage / "recipe.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
        checkpoint.publish(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    return report


def _limit(stored: Map | UnitMap, source: Path, before: Report, budget: Budget, bits: int) -> int:
    """Parameters that all matrices may have.

    Raises:
        CorankError: more than the directory holds.
    """
    dense = sum(row["params_dense"] for row in before.sites)
    limit = budget.limit(dense, before.accounting["model"]["dense"] - dense, bits)
    if limit > stored.limit:
        raise CorankError(
            f"{source} holds {stored.limit / dense:.4g} of the parameters of the selected matrices, and {budget.describe()} "
            "asks for more; start from a larger directory (keep=1 has all sizes), or ask for less."
        )
    return limit


def _units(stored: UnitMap, source: Path, before: Report, budget: Budget, uniform: bool | None, stage: Path) -> Report:
    """Take out channels and heads, and write the result."""
    if before.structure.get("class") not in ("N0", "N1"):
        raise CorankError(
            f"The blocks of {source} have different widths already; start from the directory that it was made from, or from "
            "one that was compressed with --keep 1 or uniform=true."
        )
    whole, tokenizer = load(source)
    limit = _limit(stored, source, before, budget, whole.dtype.itemsize * 8)
    settings = {**before.parameters, **({} if uniform is None else {"uniform": uniform})}
    made = get(before.method).recipe(**settings)
    recipe = dataclasses.replace(made, learn=FromMap(stored.scores))
    order = Order(before.method, settings, recipe, Budget(params=limit, scope="sites"), None, seed=before.seed or 0)
    report = compress_resident(
        whole, tokenizer, before.model, order, stage, lambda layer, stage, error: None, companions=source
    )
    old = {row["name"]: row for row in before.sites}
    rows = []
    for row in report.sites:
        first = old[row["name"]]
        same = {key: first[key] for key in ("shape", "max_rank", "params_dense", "flops_dense")}
        rows.append({**row, **same, "kind": "dense" if row["params"] == first["params_dense"] else "narrow"})
    found = _report(before, rows, budget, source, report.accounting["model"]["compressed"])
    bytes_on_disk = {**report.accounting["bytes"], "dense": before.accounting.get("bytes", {}).get("dense", 0)}
    return dataclasses.replace(
        found,
        parameters=settings,
        accounting={**found.accounting, "bytes": bytes_on_disk},
        warnings=report.warnings,
        extra={**found.extra, "structure": report.structure},
    )


def _components(stored: Map, source: Path, before: Report, budget: Budget, stage: Path) -> Report:
    """Cut the factors, and write the result."""
    whole, tokenizer = load(source)
    shapes = {row["name"]: (int(row["shape"][0]), int(row["shape"][1])) for row in before.sites}
    if shapes.keys() != stored.scores.scores.keys():
        raise CorankError(f"The score map of {source} is not that of its report.json; make the directory again.")
    limit = _limit(stored, source, before, budget, whole.dtype.itemsize * 8)
    costs = {name: Costs(lambda r, n=name: stored.cost(r, shapes[n])) for name in shapes}  # type: ignore[misc]
    kept = {name: len(units) for name, units in stored.scores.kept(costs, limit).items()}
    given = str(before.parameters.get("multiple_of", 1))
    step = max(int(given), 1) if given.isdigit() else 1
    rows = []
    for row in before.sites:
        name, rank = row["name"], kept[row["name"]]
        is_dense = row["kind"] == "dense" and stored.cost(rank, shapes[name]) >= row["params_dense"]
        if is_dense:  # every component of it costs nothing more
            kept[name] = min(shapes[name])
        elif rank < row["rank"] or row["kind"] == "dense":
            kept[name] = rank = rank - rank % step
            layer = whole.get_submodule(name)
            replace(whole, name, stored.cut(name, layer, rank).to(weight_of(layer).device))
        rows.append(row if is_dense else _row(row, whole.get_submodule(name), stored, rank))
    report = _report(before, rows, budget, source)
    plan = _plan(rows, limit)
    _save(whole, tokenizer, stage, before, report, plan)
    stored.reduced(kept, whole, limit).save(stage)
    written = sum(file.stat().st_size for file in stage.glob("*.safetensors"))
    dense_bytes = before.accounting.get("bytes", {}).get("dense", 0)
    accounting = {**report.accounting, "bytes": {"dense": dense_bytes, "compressed": written}}
    return dataclasses.replace(report, accounting=accounting)


def _row(row: dict[str, Any], module: Any, stored: Map, rank: int) -> dict[str, Any]:
    """The report's row of a matrix that has lost components."""
    factors = module.factors()
    loss = stored.loss(row["name"], rank)
    nats = {"predicted_nats": float(stored.energy[row["name"]][rank:].sum()) / 2} if "predicted_nats" in row else {}
    share = row["flops_dense"] / max(2 * row["shape"][0] * row["shape"][1], 1)
    return {
        **row,
        "kind": factors.kind,
        "rank": factors.rank,
        "params": factors.numel,
        "flops": round(factors.flops(1) * share),
        "loss": loss,
        "predicted_loss": loss,
        "curve": [],
        **nats,
    }


def _report(
    before: Report, rows: list[dict[str, Any]], budget: Budget, source: Path, parameters: int | None = None
) -> Report:
    """The account of the smaller model; what was measured of the larger one holds no longer.

    Args:
        before: that of the larger one.
        rows: one per matrix.
        budget: what was asked for.
        source: the larger one.
        parameters: of the whole result; None: counted from the rows.
    """
    dense = sum(row["params_dense"] for row in rows)
    after = sum(row["params"] for row in rows)
    flops = before.accounting["flops_per_token"]["dense"]
    accounting = {
        **before.accounting,
        "sites": {"dense": dense, "compressed": after},
        "model": {
            "dense": before.accounting["model"]["dense"],
            "compressed": before.accounting["model"]["dense"] - dense + after if parameters is None else parameters,
        },
        "flops_per_token": {
            "dense": flops,
            "compressed": flops - sum(row["flops_dense"] - row["flops"] for row in rows),
        },
    }
    return dataclasses.replace(
        before,
        budget=budget.to_dict(),
        accounting=accounting,
        sites=rows,
        peak_memory_bytes=None,
        evaluation={},
        generation={},
        speed=[],
        warnings=[],
        extra={**before.extra, "pruned_from": str(source)},
    )


def _plan(rows: list[dict[str, Any]], limit: int) -> Plan:
    choices = {row["name"]: Choice(row["kind"], row["rank"]) for row in rows}
    return Plan(choices, "acip", limit, sum(row["params"] for row in rows), None)


def _save(whole: Any, tokenizer: Any, stage: Path, before: Report, report: Report, plan: Plan) -> None:
    known = getattr(whole.config, "quantization_config", None)
    origin = known.provenance if isinstance(known, CorankConfig) else None
    if origin is None:
        origin = {"seed": before.seed, "data": before.data, "versions": before.versions, "model": before.model}
    recipe = {"method": before.method, "parameters": dict(before.parameters), "budget": dict(report.budget)}
    checkpoint.save(whole, tokenizer, stage, recipe=recipe, plan=plan.to_dict(), provenance=origin)
