"""The loop over blocks: measure, allocate, factorize and replace.

If the ranks are known beforehand, one visit to each block does everything. If they depend on what is measured
(spectra, the change each layer makes), a first visit measures all blocks and keeps the statistics on disk, and a
second one, which runs no data, factorizes. A sequential recipe carries two activation streams, of the dense and of
the compressed model, and compresses the groups of a block in the order in which the block runs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from corank.budget import ALLOCATORS, Curve, Plan
from corank.budget.grouping import with_groups
from corank.engine.forms import check, kind_of
from corank.engine.gradients import NoGradients
from corank.engine.job import Job
from corank.engine.measure import (
    curve_of,
    curves_of,
    distance,
    measure_gradients,
    measure_inputs,
    results_of,
    store_of,
)
from corank.engine.narrowing import Ways, alternatives_of, plan_families
from corank.engine.place import factorize_all
from corank.engine.sharing import grouped, joint_curves, never_alone
from corank.engine.site import cost, read_site
from corank.engine.store import StatisticsStore
from corank.errors import CorankError
from corank.factorize import Measured
from corank.jsonfile import write_json
from corank.model import Site
from corank.probing.look import look
from corank.recipe import RankChoice


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
    store = store_of(job)
    for site in job.sites:
        check(job.recipe, site, job.source.outline.whole)
    if job.of_gradients:
        _measure_gradients(job, store)
    recipe = job.recipe
    needs_curves = job.needs_curves
    # the sweep for gradients sees the inputs on its way forward
    measure_first = needs_curves or "angular" in recipe.statistics or job.cache is not None or bool(job.of_gradients)
    measure_first = measure_first or recipe.share != "none"
    curves: dict[str, Curve] = {}
    distances = None
    measure_first = measure_first and (recipe.target == "dense" or needs_curves or "angular" in recipe.statistics)
    if measure_first and job.of_inputs:
        measure_inputs(job, store)
    if needs_curves and recipe.narrowing != "narrow":
        curves = curves_of(job, store, skip=never_alone(recipe, job.sites))
    joint = joint_curves(job, store)
    ways = alternatives_of(job, store)
    if "angular" in recipe.statistics:
        distances = [distance(store, layer) for layer in range(job.source.outline.layers)]
    with job.stage("allocate"):
        plan = job.world.from_first(lambda: allocate(job, store, curves, distances, joint, ways))
    return Preparation(plan, distances, curves, measure_first)


def _measure_gradients(job: Job, store: StatisticsStore) -> None:
    """Gradient statistics; where there can be none, the recipe falls back to what it does without, if it says so."""
    try:
        if job.data is not None and job.data.examples:
            raise NoGradients("gradients of the loss on text cannot be had from calibration data that are none")
        measure_gradients(job, store)
    except NoGradients as error:
        if job.recipe.fallback is None or "gradient-mean" in job.recipe.fallback.statistics:  # allocate=zs-svd
            raise CorankError(
                f"This method measures gradients, but {error}; choose a method that needs none, such as svd-llm."
            ) from None
        warnings.warn(f"No output metric: {error}. Going on with inputs alone, which loses more.", stacklevel=2)
        job.recipe = job.recipe.fallback


def run(job: Job) -> Result:
    """Compress all sites of a job.

    Raises:
        CorankError: as in `prepare`.
    """
    prepared = prepare(job)
    if job.work and job.world.first:
        write_json(job.work / "plan.json", prepared.plan.to_dict())
    rows = factorize_all(job, store_of(job), prepared.plan, measured=prepared.measured)
    return Result(prepared.plan, rows, prepared.distances)


def allocate(
    job: Job,
    store: StatisticsStore,
    curves: dict[str, Curve],
    distances: list[float] | None,
    joint: list[list[Curve]],
    ways: Ways,
) -> Plan:
    """Choose the rank of every site, by the recipe's own rule or by an allocator. The one place where it is done."""
    recipe = job.recipe
    dense = sum(s.numel for s in job.sites)
    chosen: list[Curve] = []
    if recipe.rule is not None:
        case = RankChoice(job.sites, distances or [], job.limit, lambda s, r: cost(recipe, s, r), _loader(job, store))
        ranks: dict[str, int | None] = dict(recipe.rule(case))
        limit = job.limit if job.limit is not None else dense
        name = "rule"
    else:
        if job.limit is None:
            raise CorankError("This method needs a budget: give one of --keep, --remove, --params or --bytes.")
        limit, name = job.limit, recipe.allocate
        timed = job.clock is not None
        every = [curves.get(s.name) or curve_of(recipe, s) for s in job.sites]
        if distances:  # what a layer changes is its importance (ShortGPT's block influence)
            every = [replace(c, importance=_influence(distances, c.layer)) for c in every]
        if job.clock is not None:
            every = [job.clock.priced(c, s, kind_of(recipe, s)) for c, s in zip(every, job.sites, strict=True)]
            job.clock.require(every, limit, recipe.multiple_of)
        looked = look(job, store, every, limit)
        given = {"floor": recipe.floor, "multiple_of": recipe.multiple_of, **looked.options}

        def shared_out(curves: Sequence[Curve]) -> dict[str, int | None]:
            return ALLOCATORS[name](curves, limit, **given)

        if recipe.narrowing != "factorize":
            return plan_families(job, ways, looked.curves, limit, shared_out)
        chosen, ranks = grouped(recipe, looked.curves, joint, limit, shared_out)
        if timed:  # the plan is kept in parameters, like any other
            limit = dense
    every = [curves.get(s.name) or curve_of(recipe, s) for s in job.sites]
    every = with_groups(every, [c for c in chosen if c.members])
    full = {c.site: ranks.get(c.site) for c in every}
    kinds = {s.name: kind_of(recipe, s) for s in job.sites}
    return Plan.from_ranks(every, full, kind=kinds, allocator=name, limit=limit)


def _influence(distances: list[float], layer: int) -> float:
    """Change of the hidden states in a layer; for what lies around the layers, the mean."""
    return distances[layer] if layer < len(distances) else sum(distances) / len(distances)


def _loader(job: Job, store: StatisticsStore) -> Callable[[Site], tuple[torch.Tensor, Measured]]:
    def load(site: Site) -> tuple[torch.Tensor, Measured]:
        with job.source.block(site.layer) as block:
            W, _ = read_site(block, site, job.source.outline.local(site))
        return W, results_of(job, store, site.layer, None)(site, {})

    return load
