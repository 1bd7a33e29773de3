"""The second visit (or the only one): make the factors of every block and put them in place."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from corank.budget import Plan
from corank.engine.drift import observe_drift
from corank.engine.hidden import Part
from corank.engine.job import Job
from corank.engine.measure import advance, leaders_of, measure_block, results_of, stream_of, summed
from corank.engine.narrowing import NarrowBlock, narrow_block
from corank.engine.routed import Pools
from corank.engine.sharing import Sharing
from corank.engine.site import Replacement, dense_row, factorize_site, read_site, site_geometry
from corank.engine.spectra import truncation_of
from corank.engine.store import Activations, StatisticsStore, Table
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factorize import Measured
from corank.factors import put_together, replace, tied_to
from corank.model import Site


def factorize_all(job: Job, store: StatisticsStore, plan: Plan, measured: bool) -> list[dict[str, Any]]:
    """Second visit (or the only one): make and place the factors of every block."""
    finished = job.world.from_first(lambda: _finished(job))
    rows, first = [row for rows in finished for row in rows], len(finished)
    recipe = job.recipe
    collect = bool(job.of_inputs) and not measured and not recipe.drifted
    saved = Activations(job.work, "factorize", job.world)
    streams: dict[str, Stream] = {}
    if first < job.layers and (collect or recipe.sequential):
        with job.stage("calibrate"):
            stream = stream_of(job)
            if collect or recipe.anchored:
                streams["dense"] = stream
            if recipe.sequential:
                streams["drifted"] = stream.copy()
            kept = saved.load(first, stream.numbers, stream.total)
            if (kept[0] if kept else 0) < first:
                raise CorankError(
                    "The interrupted run cannot be continued: its activations are missing. Delete the .partial directory "
                    "and start again."
                )
            if kept:
                for each, hidden in zip(streams.values(), kept[1], strict=True):
                    each.hidden = [h.to(job.source.device) for h in hidden]
    sharing = Sharing(job, store, plan)
    for layer in range(first, job.layers):
        with job.source.block(layer) as block:
            narrow = narrow_block(job, store, plan, block, layer)
            replacements = _factorize_block(job, store, plan, block, layer, streams, collect, sharing, narrow)
            replacements = _with_tied(block, replacements)
            put_together(block)
            made = {r.site.name: r for r in replacements}
            block_rows = [narrow.row(s, made.get(s.name)) or _row(s, made.get(s.name)) for s in job.in_layer(layer)]
            with job.stage("write"):
                if streams:
                    saved.save(layer + 1, [stream.hidden for stream in streams.values()], stream.numbers)
                job.sink.put(layer, block, replacements, block_rows)
                saved.forget(layer + 1)  # and not before: a run killed between the two makes this block again
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
    sharing: Sharing,
    narrow: NarrowBlock,
) -> list[Replacement]:
    sites = [s for s in job.in_layer(layer) if plan.choices[s.name].kind != "dense"]
    if "drifted" in streams:
        return _factorize_sequentially(job, store, plan, block, layer, sites, streams, collect, sharing)
    table = None
    if collect:
        with job.stage("calibrate"):
            table = measure_block(job, block, layer, streams["dense"], job.of_inputs)
    lookup = results_of(job, store, layer, table)
    replacements = []
    with job.stage("factorize"):
        replacements = _shared(
            job,
            plan,
            sites,
            lambda s: _make(job, plan, block, s, lookup(s, {}), sharing, store, narrow.parts.get(s.name)),
        )
        for r in replacements:
            replace(block, job.source.outline.local(r.site), r.module)
    return replacements


def _row(site: Site, made: Replacement | None) -> dict[str, Any]:
    return (made.row if made is not None else None) or dense_row(site)


def _finished(job: Job) -> list[list[dict[str, Any]]]:
    """Report rows of the first blocks, as many as are finished already."""
    found = []
    for layer in range(job.layers):
        rows = job.sink.done(layer)
        if rows is None:
            break
        found.append(rows)
    return found


def _shared(job: Job, plan: Plan, sites: list[Site], make: Callable[[Site], Replacement]) -> list[Replacement]:
    """What is made of every site: each by one of the processes, and given to all.

    Those that share a basis are made in every process, of the one decomposition that all of them read.
    """
    world = job.world
    alone = [s for s in sites if plan.choices[s.name].basis is None]
    owners = world.owners([float(s.numel * sum(s.shape)) for s in alone])
    made = {s.name: make(s) for s, owner in zip(alone, owners, strict=True) if owner == world.rank}
    for others in world.gather({name: (r.module.cpu(), r.row) for name, r in made.items()} if world.size > 1 else {}):
        for site in (s for s in sites if s.name in others):
            module, row = others[site.name]
            module = made[site.name].module if site.name in made else module
            made[site.name] = Replacement(site, module.to(job.source.device), module.factors(), row)
    made |= {s.name: make(s) for s in sites if plan.choices[s.name].basis is not None}
    return [made[s.name] for s in sites]


def _make(
    job: Job,
    plan: Plan,
    block: nn.Module,
    site: Site,
    measured: Measured,
    sharing: Sharing,
    spectra: StatisticsStore | None = None,
    part: Part | None = None,
    **streams: Any,
) -> Replacement:
    if part is None:
        W, bias = read_site(block, site, job.source.outline.local(site))
        geometry = site_geometry(job.recipe, measured)
    else:
        site, W, bias, geometry = part.site, part.W, part.bias, part.geometry
    rank = plan.choices[site.name].rank
    known = None
    shared = sharing.given(site, {site.layer: block})
    if shared is None and spectra is not None and job.keeps_spectra:
        known = truncation_of(job, spectra, site, W, geometry)
    old = block.get_submodule(job.source.outline.local(site))
    given: dict[str, Any] = {"known": known, "shared": shared, "old": old, "geometry": geometry, **streams}
    made = factorize_site(job.recipe, site, W, bias, measured, rank, seed=job.seed, dtype=job.dtype, **given)
    sharing.connect(made)
    return made


def _factorize_sequentially(
    job: Job,
    store: StatisticsStore,
    plan: Plan,
    block: nn.Module,
    layer: int,
    sites: list[Site],
    streams: dict[str, Stream],
    collect: bool,
    sharing: Sharing,
) -> list[Replacement]:
    """Group by group in execution order; each sees the inputs that the groups before it, compressed, produce."""
    recipe, local = job.recipe, job.source.outline.local
    dense, drifted = streams.get("dense"), streams["drifted"]
    original = copy.deepcopy(block) if dense is not None else block
    replacements: list[Replacement] = []
    table: Table | None = {} if recipe.drifted else None
    behind = dense
    with job.stage("calibrate"):
        if collect and dense is not None:
            behind = dense.copy()  # the block's dense inputs are needed once more if the target is anchored to them
            table = measure_block(job, original, layer, behind, job.of_inputs)
        lookup = results_of(job, store, layer, table)
        for leaders in _stages(sites):
            seen, cross = (summed(job, t) for t in observe_drift(job, original, block, layer, leaders, dense, drifted))
            pools, joint = Pools(seen, leaders.values()), Pools(cross, leaders.values())
            members = [s for s in sites if s.group in leaders]
            with job.stage("factorize"), _excluded(job, "calibrate"):

                def make(s: Site, leaders=leaders, pools=pools, joint=joint) -> Replacement:  # type: ignore[no-untyped-def]
                    found = {n: each.result() for n, each in pools.of(leaders[s.group]).items()}
                    both = joint.of(leaders[s.group]).get("cross")
                    return _make(
                        job,
                        plan,
                        block,
                        s,
                        lookup(s, found if recipe.drifted else {}),
                        sharing,
                        drifted=found["gram"] if recipe.refits else None,
                        cross=None if both is None else both.result(),
                    )

                made = _shared(job, plan, members, make)
                for r in made:
                    # rounded as it will be stored, in the dtype in which the stream of the compressed model runs
                    replace(block, local(r.site), r.module.to(job.source.dtype))
                replacements += made
        if dense is not None and behind is not None:
            if collect:
                dense.hidden = behind.hidden
            else:
                advance(dense, original, layer)
        advance(drifted, block, layer)
    return replacements


@contextmanager
def _excluded(job: Job, name: str) -> Iterator[None]:
    """Do not count the time spent inside to the surrounding stage."""
    start = time.perf_counter()
    yield
    job.stages[name] = job.stages.get(name, 0.0) - (time.perf_counter() - start)


def _stages(sites: list[Site]) -> list[dict[str, Site]]:
    """Groups in the order in which they run, those that do not depend on each other (the same of all experts) together."""
    stages: dict[str, dict[str, Site]] = {}
    for group, leader in leaders_of(sites).items():
        stages.setdefault(leader.pool or group, {})[group] = leader
    return list(stages.values())


def _with_tied(block: nn.Module, replacements: list[Replacement]) -> list[Replacement]:
    """Let the embedding that is one matrix with a replaced head read the head's factors."""
    both = []
    for r in replacements:
        both.append(r)
        if r.site.tied is not None:
            embedding: Any = tied_to(block.get_submodule(r.site.tied), r.module, r.site.name)
            replace(block, r.site.tied, embedding)
            both.append(Replacement(dataclasses.replace(r.site, name=r.site.tied), embedding, r.factors, {}))
    return both
