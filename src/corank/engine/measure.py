"""The first visit: statistics of every block's inputs, gradients, and exact loss curves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from corank.budget import Curve
from corank.engine.forms import OF_INDICATORS, new_statistics, results_for, take_in
from corank.engine.gradients import Part, sweep
from corank.engine.job import Job
from corank.engine.routed import ENOUGH, PRIOR, Needs, Pools, Sampler, inner_rows, is_inner, mixture_of
from corank.engine.site import cost, generator_for, read_site, site_geometry
from corank.engine.spectra import truncation_of
from corank.engine.store import Activations, StatisticsStore, Table
from corank.engine.stream import Observer, Stream
from corank.errors import CorankError
from corank.factorize import Measured
from corank.model import Calibration, Site
from corank.recipe import Recipe
from corank.statistics import AngularDistance, NonFinite

BLOCK = "block"
"""Owner of the statistics of a whole block."""


def store_of(job: Job) -> StatisticsStore:
    """Where a job's statistics are kept."""
    return StatisticsStore(job.cache or job.scratch or Path(), job.source.device)


def leaders_of(sites: list[Site]) -> dict[str, Site]:
    """Group -> the first of the given sites that reads its input."""
    leaders: dict[str, Site] = {}
    for site in sites:
        leaders.setdefault(site.group, site)
    return leaders


class Looking:
    """Measures one block's inputs while it runs on calibration data.

    Attributes:
        table: the statistics.
    """

    def __init__(self, job: Job, layer: int, names: set[str], stream: Stream):
        leaders, plan = leaders_of(job.in_layer(layer)), job.source.outline
        self.job = job
        self.layer = layer
        self.table: Table = {group: new_statistics(names, site) for group, site in leaders.items()}
        self._observers = {
            plan.local(site): self._observer(group, site, plan.local(site)) for group, site in leaders.items()
        }
        self._inner = {plan.local(site): site for site in leaders.values() if is_inner(site)}
        self._samplers: dict[str, Sampler] = {}
        for local, site in self._inner.items():
            self.table[site.group + PRIOR] = new_statistics(names, site)
            self._samplers.setdefault(mixture_of(local)[0], Sampler(ENOUGH * site.shape[1], stream.total))
        self._needs = Needs(stream.numbers, stream.total)
        self._rows: dict[str, list[torch.Tensor]] = {path: [] for path in self._samplers}
        self._around = layer == plan.layers
        if "angular" in names and not self._around:
            self.table[BLOCK] = {"angular": AngularDistance()}

    def _observer(self, group: str, site: Site, local: str) -> Callable[..., None]:
        def observe(x: torch.Tensor, mask: torch.Tensor | None) -> None:
            for statistic in self.table[group].values():
                try:
                    take_in(statistic, site, self._block.get_submodule(local), x, mask)
                except NonFinite as error:
                    raise CorankError(
                        f"The inputs of {site.name} (layer {site.layer}) are not finite: {error}"
                    ) from None

        return observe

    def run(self, stream: Stream, block: nn.Module, i: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of the block on batch i, whose input is `hidden`."""
        self._block = block
        observers: dict[str, Observer] = {**self._observers, **self._samplers}
        out = stream.observe(block, self.layer, i, observers, stop=self._around, hidden=hidden)
        for path, sampler in self._samplers.items():
            if sampler.latest is not None:
                self._rows[path].append(sampler.latest)
        for site in self._inner.values():
            self._needs.note(site.group, self.table[site.group].values())
        if out is None:  # around the blocks nothing is wanted but what was seen
            return hidden
        if BLOCK in self.table:
            self.table[BLOCK]["angular"].update(hidden, out, stream.mask(i))
        return out

    def finish(self) -> Table:
        """The statistics, of the batches of all processes. Experts that saw too few tokens are shown some of their layer's."""
        job = self.job
        if self._inner:
            wanted = self._needs.batches({site.group: site for site in self._inner.values()}, job.world)
            for local, site in self._inner.items():
                path, number = mixture_of(local)
                for rows in (self._rows[path][i] for i in wanted[site.group]):
                    if len(rows):
                        x = inner_rows(self._block, path, number, rows)
                        for statistic in self.table[site.group + PRIOR].values():
                            statistic.update(x)
        return summed(job, self.table)


def measure_block(job: Job, block: nn.Module, layer: int, stream: Stream, names: set[str]) -> Table:
    """Statistics of one block's inputs; the stream moves on behind the block."""
    looking = Looking(job, layer, names, stream)
    stream.set_hidden(layer, [looking.run(stream, block, i, h) for i, h in enumerate(stream.hidden)])
    return looking.finish()


def summed(job: Job, table: Table) -> Table:
    """Statistics of the batches of all processes, in every one of them, from those of each one's own.

    They are sums in float64, which are added up in another order than one process would: they agree to about 1e-15.
    """
    if job.world.size == 1:
        return table
    device = job.source.device
    states = {
        (owner, name): {key: value.to(device) for key, value in statistic.state().items()}
        for owner, named in table.items()
        for name, statistic in named.items()
    }
    job.world.add(value for state in states.values() for value in state.values())
    for owner, name in list(states):
        table[owner][name] = type(table[owner][name]).from_state(states.pop((owner, name)))
    return table


def measure_gradients(job: Job, store: StatisticsStore) -> None:
    """Gradient statistics of all sites, unless the store has them.

    What the recipe wants to know of the inputs is measured in the same forward pass.
    """
    names, of_inputs = job.of_gradients, job.of_inputs
    stage = gradients_of(job)
    layers = sorted({s.layer for s in job.sites})
    if job.world.from_first(lambda: all(store.has(layer, stage, names) for layer in layers)):
        return
    _require_tokens(job)
    seen = job.world.from_first(lambda: all(store.has(layer, "inputs", of_inputs) for layer in layers))
    if job.recipe.target != "dense" or seen:
        of_inputs = set()
    # what has seen some of the sequences only is each process's own
    parts = (
        store
        if job.world.first
        else StatisticsStore((job.scratch or Path()) / f"rank-{job.world.rank}", job.source.device)
    )

    def keep(layer: int, part: Part, table: Table) -> None:
        of = "inputs" if part.forward else stage
        if not part.first:
            table = merged(table, parts.load(layer, of + PART, of_inputs if part.forward else names))
        if not part.last:
            parts.save(layer, of + PART, table)
            return
        table = summed(job, table)
        if job.world.first:
            store.save(layer, of, table)
        parts.forget(layer, of + PART)

    with job.stage("gradients"):
        sweep(
            job.source,
            data_of(job),
            job.batch,
            job.sites,
            names,
            lambda layer, stage: job.report(layer, stage, None),
            keep,
            labels=job.recipe.labels,
            seed=job.seed,
            look=(lambda layer, stream: Looking(job, layer, of_inputs, stream)) if of_inputs else None,
            world=job.world,
        )
        job.world.wait()  # until all is written


def _require_tokens(job: Job) -> None:
    """An output metric from fewer tokens than outputs would not see most directions of the output at all."""
    if not any(name.endswith("gradient") for name in job.of_gradients):
        return
    data = data_of(job)
    tokens = data.ids.numel() if data.mask is None else int(data.mask.sum())
    widest = max(job.sites, key=lambda s: s.shape[0])
    if tokens < widest.shape[0]:
        raise CorankError(
            f"{tokens} calibration tokens are too few to measure which of the {widest.shape[0]} outputs of {widest.name} "
            f"matter; give at least {-(-widest.shape[0] // data.ids.shape[1])} samples of {data.ids.shape[1]} tokens (8 "
            "times as many are better), or a method that needs no gradients, such as svd-llm."
        )


PART = "-part"
"""Suffix of a stage whose statistics are of some of the sequences only."""


def gradients_of(job: Job) -> str:
    """Stage under which a job's gradient statistics are kept."""
    return "gradients" if job.recipe.labels == "data" else f"gradients-{job.recipe.labels}"


def merged(table: Table, other: Table) -> Table:
    """The statistics of `table` with those of `other` added."""
    for owner, named in table.items():
        for name, statistic in named.items():
            statistic.merge(other[owner][name])
    return table


def measure_inputs(job: Job, store: StatisticsStore) -> None:
    """Input statistics of all blocks, those that the store does not have yet."""
    names = job.of_inputs
    blocks = job.source.outline.layers
    wanted = {layer: names if layer < blocks else names - {"angular"} for layer in range(job.layers)}
    asked = [layer for layer in wanted if job.in_layer(layer) or "angular" in wanted[layer]]
    todo = job.world.from_first(lambda: [n for n in asked if not store.has(n, "inputs", wanted[n])])
    if not todo:
        return
    with job.stage("calibrate"):
        stream = stream_of(job)
        saved = Activations(job.work, "measure", job.world)
        start = saved.load(todo[0], stream.numbers, stream.total)
        if start is not None:
            stream.hidden = [h.to(job.source.device) for h in start[1][0]]
        for layer in range(start[0] if start else 0, max(todo) + 1):
            job.report(layer, "measure", None)
            with job.source.block(layer) as block:
                if layer in todo:
                    table = measure_block(job, block, layer, stream, wanted[layer])
                    if job.world.first:
                        store.save(layer, "inputs", table)
                else:
                    advance(stream, block, layer)
            saved.save(layer + 1, [stream.hidden], stream.numbers)
            saved.forget(layer + 1)
        job.world.wait()  # until all is written
        saved.clear()


def advance(stream: Stream, block: nn.Module, layer: int) -> None:
    """Move a stream behind a block."""
    with torch.no_grad():
        stream.set_hidden(layer, [stream.run(block, layer, i) for i in range(len(stream))])


def stream_of(job: Job) -> Stream:
    """The activations of this process's calibration batches."""
    return Stream(job.source, data_of(job), job.batch, job.world)


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
    sites = job.in_layer(layer)
    stored = names | (OF_INDICATORS if any(s.form == "embedding" for s in sites) else set())
    table = inputs if inputs is not None else (store.load(layer, "inputs", stored) if names and sites else {})
    pools = Pools(table, sites)
    gradients = store.load(layer, gradients_of(job), job.of_gradients) if job.of_gradients and sites else {}
    memos: dict[str, dict[Any, Any]] = {}
    results: dict[str, dict[str, Any]] = {}

    def measured(site: Site, override: dict[str, Any]) -> Measured:
        if site.group not in results:
            results[site.group] = results_for(site, pools.of(site), names)
        own = {n: s.result() for n, s in gradients.get(site.name, {}).items()}
        return Measured({**results[site.group], **own, **override}, memos.setdefault(site.group, {}), job.recipe.affine)

    return measured


def curves_of(job: Job, store: StatisticsStore, skip: Collection[str] = ()) -> dict[str, Curve]:
    """Exact loss of every site at every rank, in the geometry of the dense model; not of those whose names are in `skip`."""
    curves: dict[str, Curve] = {}
    with job.stage("curves"):
        wanted = {layer: [s for s in job.in_layer(layer) if s.name not in skip] for layer in range(job.layers)}
        layers = [layer for layer, sites in wanted.items() if sites]
        for layer in layers[job.world.rank :: job.world.size]:
            sites = wanted[layer]
            job.report(layer, "spectra", None)
            measured = results_of(job, store, layer, None)
            with job.source.block(layer) as block:
                for site in sites:
                    W, _ = read_site(block, site, job.source.outline.local(site))
                    geometry = site_geometry(job.recipe, measured(site, {}))
                    known = truncation_of(job, store, site, W, geometry)
                    loss = (
                        job.recipe.factorize.curve(W, geometry, generator_for(job.seed, site))
                        if known is None
                        else known.loss()
                    )
                    values = np.maximum(loss.double().cpu().numpy(), 0.0)
                    padded = np.full(min(site.shape) + 1, values[-1])
                    padded[: len(values)] = values[: len(padded)]
                    if job.recipe.currency == "relative":  # otherwise layers with large activations take everything
                        padded /= max(padded[0], np.finfo(np.float64).tiny)
                    curves[site.name] = curve_of(job.recipe, site, padded)
        for others in job.world.gather(curves):
            curves |= others
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
        role=site.role,
        layer=site.layer,
    )
