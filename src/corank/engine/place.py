"""The second visit (or the only one): make the factors of every block and put them in place."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from corank.budget import Plan
from corank.engine.job import Job
from corank.engine.measure import advance, data_of, leaders_of, measure_block, new_statistics, results_of
from corank.engine.site import Replacement, dense_row, factorize_site, read_site
from corank.engine.store import Activations, StatisticsStore, Table
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factorize import Measured
from corank.factors import replace
from corank.model import Site
from corank.statistics import CrossGram


def factorize_all(job: Job, store: StatisticsStore, plan: Plan, measured: bool) -> list[dict[str, Any]]:
    """Second visit (or the only one): make and place the factors of every block."""
    rows: list[dict[str, Any]] = []
    first = 0
    while first < job.layers and (done := job.sink.done(first)) is not None:
        rows += done
        first += 1
    recipe = job.recipe
    collect = bool(job.of_inputs) and not measured and recipe.target == "dense"
    saved = Activations(job.work, "factorize")
    streams: dict[str, Stream] = {}
    if first < job.layers and (collect or recipe.sequential):
        with job.stage("calibrate"):
            stream = Stream(job.source, data_of(job), job.batch)
            if collect or recipe.target == "anchored":
                streams["dense"] = stream
            if recipe.sequential:
                streams["drifted"] = stream.copy()
            kept = saved.load(first)
            if (kept[0] if kept else 0) < first:
                raise CorankError(
                    "The interrupted run cannot be continued: its activations are missing. Delete the .partial directory "
                    "and start again."
                )
            if kept:
                for each, hidden in zip(streams.values(), kept[1], strict=True):
                    each.hidden = hidden
    for layer in range(first, job.layers):
        with job.source.block(layer) as block:
            replacements = _factorize_block(job, store, plan, block, layer, streams, collect)
            by_name = {r.site.name: r.row for r in replacements}
            block_rows = [by_name.get(s.name) or dense_row(s) for s in job.in_layer(layer)]
            with job.stage("write"):
                if streams:
                    saved.save(layer + 1, [stream.hidden for stream in streams.values()])
                job.sink.put(layer, block, replacements, block_rows)
        rows += block_rows
        error = max((r["loss"] for r in block_rows), default=None)
        job.report(layer, "factorize", error)
    saved.clear()
    return rows


def _factorize_block(
    job: Job,
    store: StatisticsStore,
    plan: Plan,
    block: nn.Module,
    layer: int,
    streams: dict[str, Stream],
    collect: bool,
) -> list[Replacement]:
    sites = [s for s in job.in_layer(layer) if plan.choices[s.name].kind != "dense"]
    if "drifted" in streams:
        return _factorize_sequentially(job, store, plan, block, layer, sites, streams, collect)
    table = None
    if collect:
        with job.stage("calibrate"):
            table = measure_block(job, block, layer, streams["dense"], job.of_inputs)
    lookup = results_of(job, store, layer, table)
    replacements = []
    with job.stage("factorize"):
        for site in sites:
            replacements.append(_make(job, plan, block, site, lookup(site, {})))
        for r in replacements:
            replace(block, job.source.outline.local(r.site), r.module)
    return replacements


def _make(job: Job, plan: Plan, block: nn.Module, site: Site, measured: Measured, **streams: Any) -> Replacement:
    W, bias = read_site(block, site, job.source.outline.local(site))
    rank = plan.choices[site.name].rank
    return factorize_site(job.recipe, site, W, bias, measured, rank, seed=job.seed, dtype=job.dtype, **streams)


def _factorize_sequentially(
    job: Job,
    store: StatisticsStore,
    plan: Plan,
    block: nn.Module,
    layer: int,
    sites: list[Site],
    streams: dict[str, Stream],
    collect: bool,
) -> list[Replacement]:
    """Group by group in execution order; each sees the inputs that the groups before it, compressed, produce."""
    recipe, local = job.recipe, job.source.outline.local
    dense, drifted = streams.get("dense"), streams["drifted"]
    original = copy.deepcopy(block) if dense is not None else block
    replacements: list[Replacement] = []
    table: Table | None = {} if recipe.target != "dense" else None
    with job.stage("calibrate"):
        if collect and dense is not None:
            table = measure_block(job, original, layer, dense, job.of_inputs)
        lookup = results_of(job, store, layer, table)
        for group, leader in leaders_of(sites).items():
            members = [s for s in sites if s.group == group]
            cross, seen = _observe_drift(job, original, block, layer, leader, dense, drifted)
            with job.stage("factorize"), _excluded(job, "calibrate"):
                override = {} if recipe.target == "dense" else {n: s.result() for n, s in seen.items()}
                joint = None if cross is None else cross.result()
                gram = seen["gram"].result() if recipe.refit else None
                made = [_make(job, plan, block, s, lookup(s, override), drifted=gram, cross=joint) for s in members]
                for r in made:
                    replace(block, local(r.site), r.module)
                replacements += made
        if dense is not None and not collect:
            advance(dense, original, layer)
        advance(drifted, block, layer)
    return replacements


@contextmanager
def _excluded(job: Job, name: str) -> Iterator[None]:
    """Do not count the time spent inside to the surrounding stage."""
    start = time.perf_counter()
    yield
    job.stages[name] = job.stages.get(name, 0.0) - (time.perf_counter() - start)


def _observe_drift(
    job: Job, original: nn.Module, block: nn.Module, layer: int, leader: Site, dense: Stream | None, drifted: Stream
) -> tuple[CrossGram | None, dict[str, Any]]:
    """Statistics of what a group sees in the compressed model, and, for an anchored target, jointly with the dense one."""
    path = job.source.outline.local(leader)
    names = job.of_inputs if job.recipe.target != "dense" else set()
    seen = new_statistics(names | ({"gram"} if job.recipe.refit else set()), leader)
    cross = CrossGram(leader.shape[1]) if job.recipe.target == "anchored" else None
    for i in range(len(drifted)):
        inputs: list[torch.Tensor] = []

        def note(x: torch.Tensor, _mask: torch.Tensor | None, inputs: list[torch.Tensor] = inputs) -> None:
            inputs.append(x)

        if cross is not None and dense is not None:
            dense.observe(original, layer, i, {path: note}, stop=True)
        drifted.observe(block, layer, i, {path: note}, stop=True)
        for statistic in seen.values():
            statistic.update(inputs[-1], drifted.mask(i))
        if cross is not None:
            cross.update(inputs[0], inputs[1], drifted.mask(i))
    return cross, seen
