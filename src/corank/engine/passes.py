"""The loop over blocks: measure, allocate, factorize and replace.

If the ranks are known beforehand, one visit to each block does everything. If they depend on what is measured
(spectra, the change each layer makes), a first visit measures all blocks and keeps the statistics on disk, and a
second one, which runs no data, factorizes. A sequential recipe carries two activation streams, of the dense and of
the compressed model, and compresses the groups of a block in the order in which the block runs them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from corank.budget import ALLOCATORS, Curve, Plan
from corank.engine.gradients import sweep
from corank.engine.site import (
    Replacement,
    cost,
    dense_row,
    factorize_site,
    generator_for,
    read_site,
    site_geometry,
)
from corank.engine.store import Activations, StatisticsStore, Table
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factorize import Measured
from corank.factors import replace
from corank.jsonfile import write_json
from corank.model import Calibration, ResidentModel, Site
from corank.recipe import RankChoice, Recipe
from corank.statistics import STATISTICS, AngularDistance, CrossGram, NonFinite

BLOCK = "block"
"""Owner of the statistics of a whole block."""


class Sink(Protocol):
    """Takes finished blocks. `done` says whether a block need not be made again."""

    def done(self, layer: int) -> list[dict[str, Any]] | None:
        """Report rows of a block that is finished already, else None."""

    def put(self, layer: int, block: nn.Module, replacements: list[Replacement], rows: list[dict[str, Any]]) -> None:
        """Take a block whose layers have been replaced."""


@dataclass
class Job:
    """One compression.

    Attributes:
        source: the model, resident or streamed.
        recipe: what to do.
        sites: the matrices to compress.
        limit: parameters allowed over the sites, None if the recipe's own rule needs no budget.
        data: calibration windows, None if the recipe measures nothing.
        sink: where finished blocks go.
        work: directory of the run (resumable), None to keep nothing.
        cache: directory of statistics to use and to fill, shared between runs on the same model and data.
        seed: of everything random.
        batch: sequences per forward pass.
        report: called with (layer, stage, relative error or None).
    """

    source: ResidentModel
    recipe: Recipe
    sites: list[Site]
    limit: int | None
    data: Calibration | None
    sink: Sink
    dtype: torch.dtype
    work: Path | None = None
    cache: Path | None = None
    seed: int = 0
    batch: int = 8
    report: Callable[[int, str, float | None], None] = lambda layer, stage, error: None
    stages: dict[str, float] = field(default_factory=dict)
    scratch: Path | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage's total."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def in_layer(self, layer: int) -> list[Site]:
        """Sites to compress in a block, in the order in which it runs them."""
        return [s for s in self.sites if s.layer == layer]

    @property
    def layers(self) -> int:
        """Number of blocks of the model."""
        return self.source.outline.layers

    @property
    def of_inputs(self) -> set[str]:
        """Statistics of the recipe that need a forward pass."""
        return {n for n in self.recipe.statistics if n not in ("fisher", "gradient")}

    @property
    def of_gradients(self) -> set[str]:
        """Statistics of the recipe that need a backward pass."""
        return {n for n in self.recipe.statistics if n in ("fisher", "gradient")}


@dataclass(frozen=True)
class Result:
    """Ranks, report rows of all sites, and what the layers change (angular distance, if measured)."""

    plan: Plan
    rows: list[dict[str, Any]]
    distances: list[float] | None


@dataclass(frozen=True)
class Preparation:
    """What is known before any weight is changed."""

    plan: Plan
    distances: list[float] | None
    curves: dict[str, Curve]
    measured: bool


def prepare(job: Job) -> Preparation:
    """Measure as far as the choice of ranks needs it, and choose them.

    Raises:
        CorankError: the budget cannot be met; weights or activations are not finite (the layer is named).
    """
    recipe, store = job.recipe, _store(job)
    needs_curves = recipe.rule is None and recipe.allocate != "uniform"
    measure_first = needs_curves or "angular" in recipe.statistics or job.cache is not None
    curves: dict[str, Curve] = {}
    distances = None
    if job.of_gradients:
        _measure_gradients(job, store)
    measure_first = measure_first and (recipe.target == "dense" or needs_curves or "angular" in recipe.statistics)
    if measure_first and job.of_inputs:
        _measure_inputs(job, store)
    if needs_curves:
        curves = _curves(job, store)
    if "angular" in recipe.statistics:
        distances = [_distance(store, layer) for layer in range(job.layers)]
    with job.stage("allocate"):
        plan = allocate(job, store, curves, distances)
    return Preparation(plan, distances, curves, measure_first)


def run(job: Job) -> Result:
    """Compress all sites of a job.

    Raises:
        CorankError: as in `prepare`.
    """
    prepared = prepare(job)
    if job.work:
        write_json(job.work / "plan.json", prepared.plan.to_dict())
    rows = _factorize(job, _store(job), prepared.plan, measured=prepared.measured)
    return Result(prepared.plan, rows, prepared.distances)


def _store(job: Job) -> StatisticsStore:
    return StatisticsStore(job.cache or job.scratch or Path())


def allocate(job: Job, store: StatisticsStore, curves: dict[str, Curve], distances: list[float] | None) -> Plan:
    """Choose the rank of every site, by the recipe's own rule or by an allocator. The one place where it is done."""
    recipe = job.recipe
    dense = sum(s.numel for s in job.sites)
    if recipe.rule is not None:
        case = RankChoice(job.sites, distances or [], job.limit, lambda s, r: cost(recipe, s, r), _loader(job, store))
        ranks: dict[str, int | None] = dict(recipe.rule(case))
        limit = job.limit if job.limit is not None else dense
        name = "rule"
    else:
        if job.limit is None:
            raise CorankError("This method needs a budget: give one of --keep, --remove, --params or --bytes.")
        limit, name = job.limit, recipe.allocate
        every = [curves.get(s.name) or _curve(recipe, s) for s in job.sites]
        ranks = ALLOCATORS[name](every, limit, floor=recipe.floor, multiple_of=recipe.multiple_of)
    every = [curves.get(s.name) or _curve(recipe, s) for s in job.sites]
    full = {s.name: ranks.get(s.name) for s in job.sites}
    return Plan.from_ranks(every, full, kind=recipe.kind, allocator=name, limit=limit)


def _loader(job: Job, store: StatisticsStore) -> Callable[[Site], tuple[torch.Tensor, Measured]]:
    def load(site: Site) -> tuple[torch.Tensor, Measured]:
        with job.source.block(site.layer) as block:
            W, _ = read_site(block, site, job.source.outline.local(site))
        return W, _results(job, store, site.layer, None)(site, {})

    return load


def _curve(recipe: Recipe, site: Site, loss: np.ndarray | None = None) -> Curve:
    """Costs at every rank, with losses if they are known (they are not when the allocator does not need them)."""
    p = min(site.shape)
    ranks = np.arange(p + 1)
    costs = np.array([cost(recipe, site, int(r)) for r in ranks], dtype=np.int64)
    return Curve(
        site=site.name,
        shape=site.shape,
        ranks=ranks,
        loss=np.full(p + 1, np.nan) if loss is None else loss,
        cost=costs,
        dense_cost=site.numel,
    )


def _new_statistics(names: set[str], site: Site) -> dict[str, Any]:
    kinds: dict[str, Any] = dict(STATISTICS)
    return {n: kinds[n](site.shape[1]) for n in names if n != "angular"}


def _leaders(sites: list[Site]) -> dict[str, Site]:
    """Group -> the first of the given sites that reads its input."""
    leaders: dict[str, Site] = {}
    for site in sites:
        leaders.setdefault(site.group, site)
    return leaders


def _observers(job: Job, table: Table, leaders: dict[str, Site]) -> dict[str, Any]:
    def observer(group: str, site: Site) -> Callable[..., None]:
        def observe(x: torch.Tensor, mask: torch.Tensor | None) -> None:
            for statistic in table[group].values():
                try:
                    statistic.update(x, mask)
                except NonFinite as error:
                    raise CorankError(
                        f"The inputs of {site.name} (layer {site.layer}) are not finite: {error}"
                    ) from None

        return observe

    return {job.source.outline.local(site): observer(group, site) for group, site in leaders.items()}


def _measure_block(job: Job, block: nn.Module, layer: int, stream: Stream, names: set[str]) -> Table:
    """Statistics of one block's inputs; the stream moves on behind the block."""
    leaders = _leaders(job.in_layer(layer))
    table: Table = {group: _new_statistics(names, site) for group, site in leaders.items()}
    observers = _observers(job, table, leaders)
    angular = AngularDistance() if "angular" in names else None
    after = []
    for i in range(len(stream)):
        out = stream.observe(block, layer, i, observers)
        assert out is not None
        if angular is not None:
            angular.update(stream.hidden[i], out, stream.mask(i))
        after.append(out)
    if angular is not None:
        table[BLOCK] = {"angular": angular}
    stream.set_hidden(layer, after)
    return table


def _measure_gradients(job: Job, store: StatisticsStore) -> None:
    names = job.of_gradients
    layers = sorted({s.layer for s in job.sites})
    if all(store.has(layer, "gradients", names) for layer in layers):
        return
    with job.stage("gradients"):
        table = sweep(job.source, _data(job), job.batch, job.sites, names, lambda l, stage: job.report(l, stage, None))
        for layer in layers:
            store.save(layer, "gradients", {s.name: table[s.name] for s in job.in_layer(layer)})


def _measure_inputs(job: Job, store: StatisticsStore) -> None:
    names = job.of_inputs
    todo = [layer for layer in range(job.layers) if not store.has(layer, "inputs", names)]
    todo = [layer for layer in todo if job.in_layer(layer) or "angular" in names]
    if not todo:
        return
    with job.stage("calibrate"):
        stream = Stream(job.source, _data(job), job.batch)
        saved = Activations(job.work, "measure")
        start = saved.load(todo[0])
        if start is not None:
            stream.hidden = start[1][0]
        for layer in range(start[0] if start else 0, max(todo) + 1):
            job.report(layer, "measure", None)
            with job.source.block(layer) as block:
                if layer in todo:
                    store.save(layer, "inputs", _measure_block(job, block, layer, stream, names))
                else:
                    _advance(stream, block, layer)
            saved.save(layer + 1, [stream.hidden])
        saved.clear()


def _advance(stream: Stream, block: nn.Module, layer: int) -> None:
    with torch.no_grad():
        stream.set_hidden(layer, [stream.run(block, layer, i) for i in range(len(stream))])


def _data(job: Job) -> Calibration:
    if job.data is None:
        raise CorankError("This method needs calibration text; give --data.")
    return job.data


def _distance(store: StatisticsStore, layer: int) -> float:
    return store.load(layer, "inputs", {"angular"})[BLOCK]["angular"].result()


def _results(
    job: Job, store: StatisticsStore, layer: int, inputs: Table | None
) -> Callable[[Site, dict[str, Any]], Measured]:
    """A function that gives the `Measured` of a site of this layer; siblings share results and metrics."""
    names = job.of_inputs - {"angular"}
    table = inputs if inputs is not None else (store.load(layer, "inputs", names) if names else {})
    gradients = store.load(layer, "gradients", job.of_gradients) if job.of_gradients else {}
    memos: dict[str, dict[Any, Any]] = {}
    results: dict[str, dict[str, Any]] = {}

    def measured(site: Site, override: dict[str, Any]) -> Measured:
        if site.group not in results:
            results[site.group] = {n: s.result() for n, s in table.get(site.group, {}).items() if n in names}
        own = {n: s.result() for n, s in gradients.get(site.name, {}).items()}
        return Measured({**results[site.group], **own, **override}, memos.setdefault(site.group, {}), job.recipe.affine)

    return measured


def _curves(job: Job, store: StatisticsStore) -> dict[str, Curve]:
    """Exact loss of every site at every rank, in the geometry of the dense model."""
    curves = {}
    with job.stage("curves"):
        for layer in range(job.layers):
            sites = job.in_layer(layer)
            if not sites:
                continue
            job.report(layer, "spectra", None)
            measured = _results(job, store, layer, None)
            with job.source.block(layer) as block:
                for site in sites:
                    W, _ = read_site(block, site, job.source.outline.local(site))
                    geometry = site_geometry(job.recipe, measured(site, {}))
                    loss = job.recipe.factorize.curve(W, geometry, generator_for(job.seed, site))
                    values = np.maximum(loss.double().cpu().numpy(), 0.0)
                    padded = np.full(min(site.shape) + 1, values[-1])
                    padded[: len(values)] = values[: len(padded)]
                    if job.recipe.currency == "relative":  # otherwise layers with large activations take everything
                        padded /= max(padded[0], np.finfo(np.float64).tiny)
                    curves[site.name] = _curve(job.recipe, site, padded)
    return curves


def _factorize(job: Job, store: StatisticsStore, plan: Plan, measured: bool) -> list[dict[str, Any]]:
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
            stream = Stream(job.source, _data(job), job.batch)
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
            table = _measure_block(job, block, layer, streams["dense"], job.of_inputs)
    lookup = _results(job, store, layer, table)
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
            table = _measure_block(job, original, layer, dense, job.of_inputs)
        lookup = _results(job, store, layer, table)
        for group, leader in _leaders(sites).items():
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
            _advance(dense, original, layer)
        _advance(drifted, block, layer)
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
    seen = _new_statistics(names | ({"gram"} if job.recipe.refit else set()), leader)
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
