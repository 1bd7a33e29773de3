"""Two families in one currency: factors of a matrix, and fewer units of the hidden vector that it makes or reads.

What a narrower vector loses is seen where it is read, in the metrics of that matrix, so that it is counted in what factors
of the matrix would lose (nats, with an output metric). A vector may stay as it is, its matrices being dense or factors;
become narrower by any number of units; or be narrowed to one of a few widths and have its matrices factorized besides,
whose losses then add up. What pays is chosen in `corank.budget.alternatives`, for all blocks at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corank.budget import Curve, Plan
from corank.budget.alternatives import Allocate, Alternative, Chosen, choose_alternatives
from corank.checkpoint.widths import block_shapes, widths_of
from corank.engine.forms import kind_of
from corank.engine.hidden import Given, Hidden, Part, parts_of, row_of, vectors_in
from corank.engine.job import Job
from corank.engine.measure import curve_of, results_of
from corank.engine.site import Replacement, read_site, site_geometry
from corank.engine.spectra import fingerprint
from corank.engine.store import StatisticsStore
from corank.errors import CorankError
from corank.factorize import Measured
from corank.linalg import psd_root
from corank.linalg.narrowing import Leading, Nested, full, nested_units, spectral_losses
from corank.model import Site
from corank.structured.narrow import put
from corank.structured.shape import BlockShape, set_attributes
from corank.structured.units import CHANNELS

SHARES = (15 / 16, 7 / 8, 13 / 16, 3 / 4, 11 / 16, 5 / 8, 1 / 2, 3 / 8)
"""Widths, as parts of the whole, at which what is left of the matrices may be factorized besides."""

Lookup = Callable[[Site, dict[str, Any]], Measured]

Ways = Sequence[tuple[Hidden, Sequence[Alternative]]]
"""Hidden vectors, with the ways to store the matrices of each together."""


def shapes_of(job: Job) -> list[BlockShape]:
    """The widths of all blocks as they are; none if they cannot be told."""
    outline = job.source.outline
    if outline.whole:
        return []
    try:
        return block_shapes(job.source.config, [outline.in_layer(layer) for layer in range(outline.layers)])
    except CorankError:
        return []


def plan_families(job: Job, ways: Ways, curves: Sequence[Curve], limit: int, allocate: Allocate) -> Plan:
    """Choose between the families, and the ranks and widths.

    Args:
        job: what is done.
        ways: from `alternatives_of`.
        curves: one per site.
        limit: stored values allowed over the sites.
        allocate: the recipe's allocator.

    Raises:
        CorankError: the budget cannot be met.
    """
    if job.recipe.narrowing == "narrow":
        curves = [_only_dense(curve) for curve in curves]
    chosen = choose_alternatives(curves, [a for _, a in ways], limit, allocate, job.recipe.multiple_of)
    return _plan(job, [vector for vector, _ in ways], chosen, limit)


def _only_dense(curve: Curve) -> Curve:
    none = np.empty(0)
    return dataclasses.replace(curve, ranks=none, loss=none, cost=none, first_order=None)


def _plan(job: Job, vectors: Sequence[Hidden], chosen: Chosen, limit: int) -> Plan:
    recipe = job.recipe
    widths: dict[str, int] = {}
    shapes: dict[str, tuple[int, int]] = {}
    by_name = {vector.name: vector for vector in vectors}
    for alternative in chosen.taken:
        vector = by_name[alternative.sites[-1]]
        units = alternative.width
        if not units:  # its one curve is that of the width
            rank = chosen.ranks[alternative.curves[0].site]
            if rank is None:
                continue
            units = rank // vector.units.size
        widths[vector.name] = units
        shapes |= {s.name: vector.narrowed(s, units).shape for s in vector.sites}
    of_widths = {a.curves[0].site for a in chosen.taken if not a.width}
    plain = [c for c in chosen.curves if c.site not in of_widths]
    kinds = {s.name: kind_of(recipe, s) for s in job.sites}
    plan = Plan.from_ranks(
        plain, {c.site: chosen.ranks[c.site] for c in plain}, kind=kinds, allocator=recipe.allocate, limit=limit
    )
    cost = sum(c.cost_at(chosen.ranks[c.site]) for c in chosen.curves)
    if cost > limit:
        raise AssertionError(f"{cost:,} parameters were allocated of {limit:,}")
    return dataclasses.replace(
        plan.with_dense({s.name: shapes.get(s.name, s.shape) for s in job.sites}),
        cost=cost,
        predicted_loss=chosen.loss,
        widths=widths,
    )


def alternatives_of(job: Job, store: StatisticsStore) -> Ways:
    """Every vector that can be narrowed, with the ways to store its matrices together; none if the recipe only factorizes.

    Raises:
        CorankError: there is no such vector although nothing else may be done.
    """
    if job.recipe.narrowing == "factorize":
        return []
    shapes = shapes_of(job)
    found: dict[tuple[int, int], tuple[Hidden, list[Alternative]]] = {}
    with job.stage("curves"):
        for layer in range(job.world.rank, len(shapes), job.world.size):
            vectors, _ = vectors_in(job, layer, shapes[layer])
            if not vectors:
                continue
            job.report(layer, "widths", None)
            lookup = results_of(job, store, layer, None)
            with job.source.block(layer) as block:
                for i, vector in enumerate(vectors):
                    given = _given(job, vector, block, lookup)
                    found[layer, i] = vector, _ways(job, store, vector, given)
        for others in job.world.gather(found):
            found |= others
    if not found and job.recipe.narrowing == "narrow":
        raise CorankError(
            "Neither channels nor heads of these blocks can be taken out; use families=factorize, or another model."
        )
    return [found[key] for key in sorted(found)]


def _ways(job: Job, store: StatisticsStore, vector: Hidden, given: Given) -> list[Alternative]:
    """By any number of units, and for each of a few widths the curves of what is left of the matrices."""
    names = tuple(s.name for s in vector.sites)
    nested = _nested(job, store, vector, given)
    size, count, per_unit = vector.units.size, vector.units.count, vector.per_unit
    ks = np.arange(1, count)
    loss = nested.loss.cpu().numpy()
    width = Curve(
        site=f"{vector.name} (width)",
        shape=(vector.columns, vector.columns),
        ranks=ks * size,
        loss=loss[1:count],
        cost=ks * per_unit,
        dense_cost=vector.dense,
        role="width",
        layer=vector.consumer.layer,
    )
    ways = [Alternative(names, (width,))]
    if job.recipe.narrowing == "narrow":
        return ways
    step = job.recipe.multiple_of if vector.units.kind == CHANNELS else 1
    grid = sorted({int(share * count) // step * step for share in SHARES} - {0, count})
    for k, rest in _spectra_of_rest(store, vector, nested, given, grid).items():
        curves = tuple(curve_of(job.recipe, vector.narrowed(s, k), rest[s.name].cpu().numpy()) for s in vector.sites)
        ways.append(Alternative(names, curves, float(loss[k]), k))
    return ways


def _spectra_of_rest(
    store: StatisticsStore, vector: Hidden, nested: Nested, given: Given, grid: Sequence[int]
) -> dict[int, dict[str, Tensor]]:
    """Width -> name of a site -> what its factors lose at every rank there; from the store if that is known."""
    prints = [fingerprint(given[s.name][0], given[s.name][2], str(grid)) for s in vector.sites]
    key = "rest-" + hashlib.blake2b("".join(prints).encode(), digest_size=16).hexdigest()
    kept = store.load_spectrum(vector.consumer.layer, key)
    if kept is None:
        kept, R = {}, given[vector.name][2].R
        left = None if R is None else psd_root(R.double())  # the same at every width
        W, _, geometry = given[vector.name]
        leading = Leading.of(W, full(geometry.right.G, W), nested.order, vector.units.size)
        for k in grid:
            for name, part in parts_of(vector, nested.kept(k), given, leading.matrix(k)).items():
                right = part.geometry.right
                root = right.root if part.W.shape[0] > part.W.shape[1] else None  # shared by the siblings
                kept[f"{k} {name}"] = spectral_losses(
                    part.W, right.G, part.geometry.R, root, left if name == vector.name else None
                )
        store.save_spectrum(vector.consumer.layer, key, kept)
    return {k: {s.name: kept[f"{k} {s.name}"] for s in vector.sites} for k in grid}


def _given(job: Job, vector: Hidden, block: nn.Module, lookup: Lookup) -> Given:
    given = {}
    for site in vector.sites:
        W, bias = read_site(block, site, job.source.outline.local(site))
        given[site.name] = (
            W if W.dtype == torch.float64 else W.float(),
            bias,
            site_geometry(job.recipe, lookup(site, {})),
        )
    return given


def _nested(job: Job, store: StatisticsStore, vector: Hidden, given: Given) -> Nested:
    """The order of the units, from the store if it has been found before."""
    W, _, geometry = given[vector.name]
    key = "width-" + fingerprint(W, geometry, str(vector.units.size))
    kept = store.load_spectrum(vector.consumer.layer, key)
    if kept is not None:
        return Nested(kept["order"], kept["loss"])
    found = nested_units(W, full(geometry.right.G, W), geometry.R, vector.units.size)
    store.save_spectrum(vector.consumer.layer, key, {"order": found.order, "loss": found.loss})
    return found


@dataclasses.dataclass(eq=False)
class NarrowBlock:
    """What has been done to a block before its matrices are factorized.

    Attributes:
        parts: name of a site -> what is left of it; empty if nothing was narrowed.
    """

    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    _of: dict[str, tuple[Hidden, Tensor, Given, Nested]] = dataclasses.field(default_factory=dict)

    def row(self, site: Site, made: Replacement | None) -> dict[str, Any] | None:
        """The report's row of a site, None if it is as it was.

        Args:
            site: one of the job's.
            made: what the rest of it has become if it was factorized.
        """
        if site.name not in self.parts:
            return None
        vector, kept, given, nested = self._of[site.name]
        return row_of(vector, self.parts[site.name], kept, given, nested, made)


def narrow_block(job: Job, store: StatisticsStore, plan: Plan, block: nn.Module, layer: int) -> NarrowBlock:
    """Bring a block to the widths of a plan, in place."""
    made = NarrowBlock()
    if not any(s.name in plan.widths for s in job.in_layer(layer)):
        return made
    shape, lookup = shapes_of(job)[layer], results_of(job, store, layer, None)
    with job.stage("narrow"):
        for vector in vectors_in(job, layer, shape)[0]:
            units = plan.widths.get(vector.name)
            if units is None:
                continue
            given = _given(job, vector, block, lookup)
            nested = _nested(job, store, vector, given)
            kept = nested.kept(units)
            for name, part in parts_of(vector, kept, given).items():
                # rounded as it will be stored, like factors
                bias = None if part.bias is None else part.bias.to(job.dtype)
                stored = part.W.to(job.dtype)
                put(block, job.source.outline.local(part.site), stored, bias)
                if plan.choices[name].is_dense:
                    part = dataclasses.replace(part, W=stored.to(part.W.dtype))
                made.parts[name] = part
                made._of[name] = (vector, kept, given, nested)
            after = vector.after(shape, units)
            set_attributes(block, job.source.config, shape, after)
            shape = after
    return made


def narrowed_sites(job: Job, plan: Plan) -> dict[str, Site]:
    """The sites of a job with the shapes that a plan gives them."""
    sites = {s.name: s for s in job.sites}
    if not plan.widths:
        return sites
    for layer, shape in enumerate(shapes_of(job)):
        for vector in vectors_in(job, layer, shape)[0]:
            if vector.name in plan.widths:
                sites |= {s.name: vector.narrowed(s, plan.widths[vector.name]) for s in vector.sites}
    return sites


def stored_shape(job: Job, plan: Plan) -> dict[str, Any] | None:
    """The widths of all blocks for the checkpoint, None if its configuration says them."""
    if not plan.widths:
        return widths_of(job.source.config)
    return {**(widths_of(job.source.config) or {}), "blocks": [shape.to_dict() for shape in _after(job, plan)]}


def _after(job: Job, plan: Plan) -> list[BlockShape]:
    """The widths that a plan gives to all blocks."""
    shapes = shapes_of(job)
    for name, units in plan.widths.items():
        site = next(s for s in job.sites if s.name == name)
        shape = shapes[site.layer]
        if site.role == "down":
            shapes[site.layer] = dataclasses.replace(shape, channels=units)
        else:
            groups = shape.heads // shape.kv_heads
            shapes[site.layer] = dataclasses.replace(shape, kv_heads=units, heads=units * groups)
    return shapes


def structure_of(job: Job, plan: Plan) -> dict[str, Any]:
    """What the report says of the widths; empty if all blocks have those of the source."""
    if not plan.widths:
        return {}
    factors = any(not choice.is_dense for choice in plan.choices.values())
    return {
        "structure": {
            "class": "N4" if factors else "N2",
            "kept": list(range(job.source.outline.layers)),
            "removed": [],
            "merged": {},
            "blocks": [shape.to_dict() for shape in _after(job, plan)],
            "narrowed": dict(plan.widths),
            "factorized": [name for name, choice in plan.choices.items() if not choice.is_dense],
        }
    }
