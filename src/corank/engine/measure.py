"""The first visit: statistics of every block's inputs, gradients, and exact loss curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from corank.budget import Curve
from corank.engine.gradients import sweep
from corank.engine.job import Job
from corank.engine.site import cost, generator_for, read_site, site_geometry
from corank.engine.store import Activations, StatisticsStore, Table
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factorize import Measured
from corank.model import Calibration, Site
from corank.recipe import Recipe
from corank.statistics import STATISTICS, AngularDistance, NonFinite

BLOCK = "block"
"""Owner of the statistics of a whole block."""


def store_of(job: Job) -> StatisticsStore:
    """Where a job's statistics are kept."""
    return StatisticsStore(job.cache or job.scratch or Path())


def new_statistics(names: set[str], site: Site) -> dict[str, Any]:
    """Empty statistics of a site's input."""
    kinds: dict[str, Any] = dict(STATISTICS)
    return {n: kinds[n](site.shape[1]) for n in names if n != "angular"}


def leaders_of(sites: list[Site]) -> dict[str, Site]:
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


def measure_block(job: Job, block: nn.Module, layer: int, stream: Stream, names: set[str]) -> Table:
    """Statistics of one block's inputs; the stream moves on behind the block."""
    leaders = leaders_of(job.in_layer(layer))
    table: Table = {group: new_statistics(names, site) for group, site in leaders.items()}
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


def measure_gradients(job: Job, store: StatisticsStore) -> None:
    """Gradient statistics of all sites, unless the store has them."""
    names = job.of_gradients
    layers = sorted({s.layer for s in job.sites})
    if all(store.has(layer, "gradients", names) for layer in layers):
        return
    with job.stage("gradients"):
        table = sweep(
            job.source, data_of(job), job.batch, job.sites, names, lambda l, stage: job.report(l, stage, None)
        )
        for layer in layers:
            store.save(layer, "gradients", {s.name: table[s.name] for s in job.in_layer(layer)})


def measure_inputs(job: Job, store: StatisticsStore) -> None:
    """Input statistics of all blocks, those that the store does not have yet."""
    names = job.of_inputs
    todo = [layer for layer in range(job.layers) if not store.has(layer, "inputs", names)]
    todo = [layer for layer in todo if job.in_layer(layer) or "angular" in names]
    if not todo:
        return
    with job.stage("calibrate"):
        stream = Stream(job.source, data_of(job), job.batch)
        saved = Activations(job.work, "measure")
        start = saved.load(todo[0])
        if start is not None:
            stream.hidden = start[1][0]
        for layer in range(start[0] if start else 0, max(todo) + 1):
            job.report(layer, "measure", None)
            with job.source.block(layer) as block:
                if layer in todo:
                    store.save(layer, "inputs", measure_block(job, block, layer, stream, names))
                else:
                    advance(stream, block, layer)
            saved.save(layer + 1, [stream.hidden])
        saved.clear()


def advance(stream: Stream, block: nn.Module, layer: int) -> None:
    """Move a stream behind a block."""
    with torch.no_grad():
        stream.set_hidden(layer, [stream.run(block, layer, i) for i in range(len(stream))])


def data_of(job: Job) -> Calibration:
    """The job's calibration windows, which must be there."""
    if job.data is None:
        raise CorankError("This method needs calibration text; give --data.")
    return job.data


def distance(store: StatisticsStore, layer: int) -> float:
    """Angular distance between the input and the output of a block."""
    return store.load(layer, "inputs", {"angular"})[BLOCK]["angular"].result()


def results_of(
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


def curves_of(job: Job, store: StatisticsStore) -> dict[str, Curve]:
    """Exact loss of every site at every rank, in the geometry of the dense model."""
    curves = {}
    with job.stage("curves"):
        for layer in range(job.layers):
            sites = job.in_layer(layer)
            if not sites:
                continue
            job.report(layer, "spectra", None)
            measured = results_of(job, store, layer, None)
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
                    curves[site.name] = curve_of(job.recipe, site, padded)
    return curves


def curve_of(recipe: Recipe, site: Site, loss: np.ndarray | None = None) -> Curve:
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
