"""Looking at a model, and at what a plan would do, without changing anything."""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from corank.api import load_tokenizer, to_dtype
from corank.checkpoint import CorankConfig
from corank.engine.directory import MemorySink
from corank.engine.narrowing import narrowed_sites
from corank.engine.passes import prepare
from corank.engine.site import read_site, stored
from corank.errors import CorankError
from corank.model import Site, StreamedModel, outline
from corank.order import Order
from corank.report.report import ROLES
from corank.structured.outcome import rows_of
from corank.structured.plan import make_plan
from corank.structured.recipe import Structured
from corank.structured.task import Task

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)


def by_role(sites: list[Site]) -> dict[str, list[Site]]:
    """Sites by role, the usual roles first."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.role].append(site)
    known = [r for r in ROLES if r in groups]
    return {r: groups[r] for r in (*known, *(r for r in groups if r not in known))}


def describe(path: Path) -> dict[str, Any]:
    """Architecture, layers, parameters, and one row per role."""
    section = json.loads((path / "config.json").read_text()).get("quantization_config") or {}
    ours = CorankConfig.from_dict(section) if section.get("quant_method") == "corank" else CorankConfig()
    modules, config = ours.modules, AutoConfig.from_pretrained(path)
    plan = outline(config)
    roles = []
    names = {site.name: site for site in plan.sites}
    for role, sites in by_role(list(plan.sites)).items():
        leaders = {names[s.group].role for s in sites if s.group != s.name}
        kinds = sorted({modules.get(s.name, {}).get("kind", "dense") for s in sites})
        shapes = sorted({s.shape for s in sites})
        roles.append(
            {
                "role": role,
                "sites": len(sites),
                "shape": ", ".join(f"{m}×{n}" for m, n in shapes),
                "group": ", ".join(sorted(leaders)) or "its own",
                "bias": any(s.bias for s in sites),
                "params": sum(s.numel for s in sites),
                "kind": ", ".join(kinds),
            }
        )
    return {
        "architecture": (config.architectures or [config.model_type])[0],
        "layers": plan.layers,
        "parameters": plan.parameters,
        "blocks": plan.blocks,
        "roles": roles,
    }


def spectra(path: Path, progress: Callable[[int, str, float | None], None]) -> list[dict[str, Any]]:
    """For each role, the mean share of the full rank that holds 50% ... 99% of the squared singular values."""
    source = StreamedModel(path)
    shares: dict[str, list[list[float]]] = defaultdict(list)
    for layer in range(source.outline.layers):
        progress(layer, "spectra", None)
        with source.block(layer) as block:
            for site in source.outline.in_layer(layer):
                W, _ = read_site(block, site, source.outline.local(site))
                energy = torch.linalg.svdvals(W.float()).double().square()
                held = energy.cumsum(0) / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
                shares[site.role].append([(int((held < level).sum()) + 1) / len(energy) for level in LEVELS])
    order = by_role(list(source.outline.sites))
    return [
        {
            "role": role,
            **{str(level): math.fsum(s[i] for s in shares[role]) / len(shares[role]) for i, level in enumerate(LEVELS)},
        }
        for role in order
    ]


def plan_for(
    path: Path,
    method: str,
    budget: Mapping[str, Any],
    scope: str | None,
    settings: Mapping[str, Any],
    *,
    data: str,
    samples: int,
    length: int,
    seed: int,
    batch: int,
    device: str,
    dtype: str | None,
    watch: Callable[[int, str, float | None], None],
) -> dict[str, Any]:
    """What a method would do at a budget: ranks by role, parameters, and predicted losses where spectra were needed."""
    order = Order.take(method, budget, scope, settings, data, samples=samples, length=length, seed=seed, batch=batch)
    source = StreamedModel(path, device, to_dtype(dtype))
    tokenizer = load_tokenizer(path) if order.text is not None else None
    if isinstance(order.recipe, Structured):
        return _plan_of_blocks(order.task(source, tokenizer, source.stored_dtype, report=watch))
    with tempfile.TemporaryDirectory() as scratch:
        job = order.job(source, tokenizer, MemorySink(), source.stored_dtype, report=watch, scratch=Path(scratch))
        prepared = prepare(job)
        narrow = narrowed_sites(job, prepared.plan)
    roles = []
    for role, sites in by_role(job.sites).items():
        choices = {s.name: prepared.plan.choices[s.name] for s in sites}
        ranks = [c.rank for c in choices.values() if not c.is_dense]
        after = sum(stored(job.recipe, narrow[s.name], choices[s.name]) for s in sites)
        losses = []
        for s in sites:
            curve = prepared.curves.get(s.name)
            # what a member of a group loses, or what is left of a matrix, is not on its own curve
            alone = choices[s.name].basis is None and narrow[s.name] is s
            if alone and curve is not None and curve.loss[0] > 0:
                losses.append(
                    0.0 if choices[s.name].is_dense else math.sqrt(curve.loss[choices[s.name].rank] / curve.loss[0])
                )
        roles.append(
            {
                "role": role,
                "sites": len(sites),
                "dense": len(sites) - len(ranks),
                "ranks": "–"
                if not ranks
                else f"{min(ranks)}"
                if min(ranks) == max(ranks)
                else f"{min(ranks)}–{max(ranks)}",
                "kept": after / sum(s.numel for s in sites),
                "loss": math.fsum(losses) / len(losses) if losses else None,
            }
        )
    plan = prepared.plan
    return {
        "allocator": plan.allocator,
        "limit": plan.limit,
        "cost": plan.cost,
        "dense": sum(s.numel for s in job.sites),
        "roles": roles,
        "choices": plan.to_dict()["choices"],
        **({"widths": plan.widths} if plan.widths else {}),
    }


def _plan_of_blocks(task: Task) -> dict[str, Any]:
    """What a method would do that takes blocks away or narrows them.

    Raises:
        CorankError: there is nothing to choose beforehand.
    """
    if "residual" in task.recipe.units:
        raise CorankError(
            "This method cuts all matrices alike, to the one width that the budget allows; there is nothing to plan."
        )
    plan = make_plan(task)
    rows = rows_of(task, plan, {})
    roles = []
    for role, sites in by_role([s for layer in range(task.layers) for s in task.sites(layer)]).items():
        names = {s.name for s in sites}
        mine = [row for row in rows if row["name"] in names]
        widths = [row["rank"] for row in mine if row["kind"] == "narrow"]
        span = sorted({min(widths), max(widths)}) if widths else []
        roles.append(
            {
                "role": role,
                "sites": len(mine),
                "dense": sum(row["kind"] == "dense" for row in mine),
                "ranks": "–".join(map(str, span)) or "–",
                "kept": sum(row["params"] for row in mine) / sum(row["params_dense"] for row in mine),
                "loss": None,
            }
        )
    return {
        "allocator": task.recipe.allocate if task.recipe.units else "whole blocks",
        "limit": task.limit,
        "cost": sum(row["params"] for row in rows),
        "dense": sum(row["params_dense"] for row in rows),
        "roles": roles,
        "choices": {row["name"]: {"kind": row["kind"], **row["becomes"]} for row in rows},
        "structure": plan.to_dict(),
    }
