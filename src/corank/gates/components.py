"""The order in which the components of all matrices of a model are given up, learned once for all sizes.

W = sum_i up_i project_i W; a gate between the two factors of every component; the gates are trained while a penalty closes
them, and the order in which they close is the order in which components go (ACIP, arXiv:2502.01717).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corank import checkpoint
from corank.budget import Curve
from corank.engine.job import Job
from corank.engine.measure import data_of, results_of
from corank.engine.site import cost, read_site, site_geometry
from corank.engine.spectra import fingerprint, truncation_of
from corank.engine.store import StatisticsStore
from corank.errors import CorankError
from corank.factorize import Spectral
from corank.gates.gate import Directions, Gates
from corank.gates.relax import StraightThrough
from corank.gates.scores import Costs, Recorder, ScoreMap
from corank.gates.shrinking import Shrinking, rate
from corank.gates.training import steps, train
from corank.heal.distillation import predictions
from corank.linalg import Truncation
from corank.model import ResidentModel, Site, StreamedModel
from corank.probing.first_order import require_components
from corank.probing.probe import check

SEQUENCES = 2
"""Calibration windows in one step."""
TOP = 256
"""Tokens of the dense model's predictions that are kept."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A score map of components, and the components.

    Attributes:
        map: site -> scores of its components, in the order of `truncations`.
        truncations: site -> its components, those that stay longest first.
        kept: site -> how many stay at the size that was asked for.
    """

    map: ScoreMap
    truncations: dict[str, Truncation]
    kept: dict[str, int]


def learned(
    job: Job, store: StatisticsStore, curves: Sequence[Curve], limit: int
) -> tuple[dict[str, int | None], Scored]:
    """Ranks of all sites from a score map, which is trained unless the store has it; and the map.

    Args:
        job: the model is loaded as a whole if it is streamed, because it is trained.
        store: with the recipe's statistics; the map is kept in it. It does not depend on the limit.
        curves: one per site.
        limit: stored values allowed over all sites.

    Raises:
        CorankError: the model or the recipe is not one that gates can be trained in.
    """
    _check(job)
    truncations, key = _truncations(job, store)
    file = store.root / f"scores-{key}.safetensors"
    if file.is_file():
        scores = ScoreMap.load(file)[0]
    else:
        scores = _trained(job, truncations, store.root / f"gates-{key}.pt")
        scores.save(file)
    recipe, sites = job.recipe, {s.name: s for s in job.sites}
    costs = {n: Costs(lambda r, s=s: min(cost(recipe, s, r), s.numel)) for n, s in sites.items()}  # type: ignore[misc]
    dense = sum(s.numel for s in job.sites)
    floors = {n: int(recipe.floor * min(limit, dense) / dense * s.numel / sum(s.shape)) for n, s in sites.items()}
    kept = {n: len(k) for n, k in scores.kept(costs, limit, floors).items()}
    ranks: dict[str, int | None] = {}
    for name, site in sites.items():
        rank = kept[name] - kept[name] % max(recipe.multiple_of, 1)
        whole = kept[name] == min(site.shape) or cost(recipe, site, kept[name]) >= site.numel
        ranks[name] = None if whole else rank
        kept[name] = min(site.shape) if whole else rank
    order = scores.ranked()
    first = {n: _in_order(t, order[n]) for n, t in truncations.items()}
    return ranks, Scored(scores.take(order), first, kept)


def _in_order(truncation: Truncation, order: Tensor) -> Truncation:
    """The same components in another order; what ranks of it lose is still what it says, as they are orthogonal."""
    place = order.to(truncation.up.device)
    return Truncation(truncation.up[:, place], truncation.project[place], truncation.energy[place], truncation.total)


def _check(job: Job) -> None:
    check(job)
    require_components(job)
    if job.world.size > 1:
        raise CorankError("allocate=acip trains in one process; start it without torchrun.")
    if job.recipe.share != "none" or job.clock is not None:
        raise CorankError("allocate=acip needs share=none and a budget of size.")
    if not job.source.model.can_generate():
        raise CorankError(
            "allocate=acip learns from predictions of text; give a causal language model, or use lagrange."
        )
    other = next((s for s in job.sites if s.form != "linear" or s.pool is not None), None)
    if other is not None:
        raise CorankError(
            f"allocate=acip puts gates into linear layers, and {other.name} is none of its own; leave it out "
            f"(ignore={other.name}) or use allocate=lems."
        )


def _truncations(job: Job, store: StatisticsStore) -> tuple[dict[str, Truncation], str]:
    """The components of all sites, by energy, and a hash of all that a score map depends on."""
    recipe, data = job.recipe, data_of(job)
    assert isinstance(recipe.factorize, Spectral)
    how = [recipe.learning, recipe.steps, recipe.kind, recipe.affine, job.seed, job.source.dtype]
    how += [recipe.minutes] if recipe.minutes is not None else []
    digest = hashlib.sha256("|".join(map(str, how)).encode())
    digest.update(data.ids.numpy().tobytes())
    found = {}
    for layer in range(job.source.outline.layers):
        sites = job.in_layer(layer)
        if not sites:
            continue
        lookup = results_of(job, store, layer, None)
        with job.source.block(layer) as block:
            for site in sites:
                W, _ = read_site(block, site, job.source.outline.local(site))
                geometry = site_geometry(recipe, lookup(site, {}))
                truncation = truncation_of(job, store, site, W, geometry)
                assert truncation is not None
                if len(truncation.energy) != truncation.up.shape[1]:
                    raise CorankError(f"The metric of {site.name} is singular; use a method without an output metric.")
                found[site.name] = truncation
                target = W if W.dtype == torch.float64 else W.float()
                digest.update(fingerprint(target, geometry, recipe.factorize.precision).encode())
    return found, digest.hexdigest()[:16]


def _trained(job: Job, truncations: Mapping[str, Truncation], state: Any) -> ScoreMap:
    """Train the gates; the model is as it was afterwards."""
    recipe, data = job.recipe, data_of(job)
    taught = None
    if recipe.learning.loss == "kd":
        taught = predictions(job.source, data, TOP, report=lambda done, of: _tell(job, done, of))
    model = _resident(job)
    sites = {s.name: s for s in job.sites}
    places = [_directions(model, sites[name], truncation, job) for name, truncation in truncations.items()]
    gates = Gates(places, StraightThrough(), device=model.device)
    first = prior({n: t.energy / max(t.total, 1e-300) / sum(sites[n].shape) for n, t in truncations.items()})
    if recipe.learning.prior == "energy":
        with torch.no_grad():
            for name, theta in gates.theta.items():
                theta.copy_(first[name])
    shrinking, recorder = Shrinking(gates, recipe.learning.to, recipe.steps), Recorder(gates)
    schedule = steps(
        recipe.steps,
        len(data.ids),
        batch=SEQUENCES,
        learning_rate=rate(recipe.steps),
        minutes=recipe.minutes,  # what is still open then is ranked by its gates
        seed=job.seed,
        clip=float("inf"),
        checks=1,
    )
    with gates.attached(model.model):
        history = train(
            model,
            gates,
            data,
            schedule,
            penalty=shrinking,
            taught=taught,
            companions=[recorder, shrinking],
            state=state,
            report=lambda done, of, value, size: _tell(job, done, of),
        )
    if history.ended:
        raise CorankError(
            f"Training the gates failed: {history.ended}; set start=svd or loss=text, or give other data."
        )
    state.unlink(missing_ok=True)
    return ScoreMap(recorder.scores().scores, first)


def prior(worth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Places of all components in the order of their worth, in (0, 1], the best at 1: name -> float64 [p]."""
    names = list(worth)
    every = torch.cat([worth[n].double().cpu() for n in names])
    place = torch.empty_like(every)
    place[every.argsort(stable=True)] = torch.arange(1, len(every) + 1, dtype=torch.float64) / max(len(every), 1)
    return dict(zip(names, place.split([len(worth[n]) for n in names]), strict=True))


def _directions(model: ResidentModel, site: Site, truncation: Truncation, job: Job) -> Directions:
    from corank.factors import weight_of

    W = weight_of(model.model.get_submodule(site.name))
    up, project = truncation.up.to(W.device), truncation.project.to(W.device)
    down = (project @ W.to(project.dtype)).to(W.dtype)
    return Directions(
        site.name, site.name, up.to(W.dtype), down, count_values=lambda m, n, r: cost(job.recipe, site, r)
    )


def _resident(job: Job) -> ResidentModel:
    """The model in memory as a whole."""
    source = job.source
    if not isinstance(source, StreamedModel):
        return source
    whole, _ = checkpoint.load(source.path, dtype=source.dtype, device=str(source.device), tokenizer=False)
    return ResidentModel(whole, source.outline)


def _tell(job: Job, done: int, of: int) -> None:
    layers = job.source.outline.layers
    job.report(min(done * layers // max(of, 1), layers - 1), "train", None)
