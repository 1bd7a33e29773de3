"""One basis for several sites: which they are, what they lose together, and their factors.

The first site of a group, in the order of the model, stores the basis. What all of them are like has to be known before
that one is written: their statistics are measured in the first visit, and the blocks of a group are read together, so
that as many blocks as a group spans are in memory at a time. The decomposition of a group is kept on disk like that of a
site; whoever needs factors of it, in the same run or in one that goes on from a killed one, gets the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corank.budget import Curve, Plan
from corank.budget.grouping import choose_groups, with_groups
from corank.engine.job import Job
from corank.engine.measure import results_of
from corank.engine.site import Replacement, bias_cost, read_site, site_geometry
from corank.engine.spectra import fingerprint
from corank.engine.store import StatisticsStore
from corank.factorize import Factored, Geometry, Spectral
from corank.factorize.joint import Joint, decompose_jointly
from corank.factors import LowRank, SharedLowRank, SharedLowRankLinear, count_shared, linear
from corank.linalg import Truncation
from corank.model import Site, sites_with_roles
from corank.recipe import Recipe

Group = tuple[Site, ...]

ACROSS = ("q", "k", "v", "gate", "up")
"""Roles that share across layers (Basis Sharing): what reads the residual stream. o and down do not."""
PAIRS = {"q": "qk", "k": "qk", "gate": "mlp", "up": "mlp"}


def families_of(recipe: Recipe, sites: list[Site]) -> list[list[Group]]:
    """The ways in which a recipe may group sites; in each, no two groups have a site in common."""
    free = [s for s in sites if s.form == "linear" and not s.outside and s.tied is None and s.pool is None]
    if recipe.share in ("siblings", "pairs"):
        return [_siblings(free, recipe.share == "pairs")]
    if recipe.share == "layers":
        return [_layers(free, recipe.group)]
    return [_siblings(free, False), _layers(free, recipe.group)] if recipe.share == "auto" else []


def never_alone(recipe: Recipe, sites: list[Site]) -> set[str]:
    """Sites whose curves of their own nobody asks for."""
    if recipe.share == "auto":
        return set()
    return {s.name for family in families_of(recipe, sites) for group in family for s in group}


def _siblings(sites: Iterable[Site], pairs: bool) -> list[Group]:
    """Sites that read one and the same input; if `pairs`, only q with k, and gate with up."""

    def key(site: Site) -> Any:
        return (site.group, PAIRS.get(site.role)) if pairs else site.group

    return _gathered((s for s in sites if not pairs or s.role in PAIRS), key)


def _layers(sites: list[Site], size: int) -> list[Group]:
    """The same matrix of `size` neighbouring layers."""

    def key(site: Site) -> Any:
        assert site.block is not None
        path = site.name.replace(f".{site.block}.", ".*.", 1)  # as it is called in every layer
        return (site.block // size, path, site.shape[1])

    return _gathered((s for s in sites_with_roles(sites, ACROSS) if s.block is not None), key)


def _gathered(sites: Iterable[Site], key: Callable[[Site], Any]) -> list[Group]:
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def joint_curves(job: Job, store: StatisticsStore) -> list[list[Curve]]:
    """Costs of every group at every rank, with losses if the choice of ranks needs them; family by family."""
    families = families_of(job.recipe, job.sites)
    if not job.needs_curves:
        return [[_curve(job.recipe, group) for group in family] for family in families]
    found: dict[tuple[int, str], Curve] = {}
    spans: dict[tuple[int, ...], list[tuple[int, Group]]] = {}
    for i, family in enumerate(families):
        for group in family:
            spans.setdefault(_span(group), []).append((i, group))
    with job.stage("curves"):
        for span in sorted(spans)[job.world.rank :: job.world.size]:
            job.report(span[0], "spectra", None)
            with _reading(job, store, span) as read:
                for i, group in spans[span]:
                    parts = [read(site) for site in group]
                    loss = _joint(job, store, group, parts).losses.clamp_min(0.0)
                    if job.recipe.currency == "relative":
                        loss = loss / loss[:, :1].clamp_min(torch.finfo(loss.dtype).tiny)
                    found[i, group[0].name] = _curve(job.recipe, group, loss.sum(0).cpu().numpy())
        for others in job.world.gather(found):
            found |= others
    return [[found[i, group[0].name] for group in family] for i, family in enumerate(families)]


def _curve(recipe: Recipe, group: Group, loss: np.ndarray | None = None) -> Curve:
    ms, n = [s.shape[0] for s in group], group[0].shape[1]
    ranks = np.arange(min(sum(ms), n) + 1)
    extra = sum(bias_cost(recipe, s) for s in group)
    roles = list(dict.fromkeys(s.role for s in group))
    return Curve(
        site=group[0].name,
        shape=(sum(ms), n),
        ranks=ranks,
        loss=np.full(len(ranks), np.nan) if loss is None else loss,
        cost=np.array([count_shared(ms, n, int(k)) + extra for k in ranks]),
        dense_cost=sum(s.numel for s in group),
        role="+".join(roles),
        layer=group[0].layer,
        members={s.name: s.shape for s in group},
    )


def grouped(
    recipe: Recipe,
    private: list[Curve],
    joint: list[list[Curve]],
    limit: int,
    allocate: Callable[[Any], dict[str, int | None]],
) -> tuple[list[Curve], dict[str, int | None]]:
    """The curves of what the recipe lets share and of the sites left alone, and the ranks an allocator gives them."""
    if not joint:
        return private, allocate(private)
    importance = {curve.site: curve.importance for curve in private}

    def weighed(curve: Curve) -> Curve:
        mean = sum(importance[name] for name in curve.members) / len(curve.members)
        return dataclasses.replace(curve, importance=mean)

    joint = [[weighed(curve) for curve in family] for family in joint]
    if recipe.share == "auto":
        return choose_groups(private, joint, limit, allocate, recipe.multiple_of)
    curves = with_groups(private, joint[0])
    return curves, allocate(curves)


class Sharing:
    """The factors of the groups of a plan. Those of a group are made when its first site is reached.

    Args:
        job: what is done.
        store: where statistics and decompositions are.
        plan: whose groups they are.
    """

    def __init__(self, job: Job, store: StatisticsStore, plan: Plan):
        self.job, self.store, self.plan = job, store, plan
        self.groups: dict[str, list[Site]] = {}
        for site in job.sites:
            if (basis := plan.choices[site.name].basis) is not None:
                self.groups.setdefault(basis, []).append(site)
        self._made: dict[str, dict[str, Factored]] = {}
        self._owners: dict[str, nn.Module] = {}
        if job.world.size > 1 and self.groups:  # one of the processes decomposes each, and all read it
            for basis in list(self.groups)[job.world.rank :: job.world.size]:
                self._factors(basis, {})
            job.world.wait()

    def given(self, site: Site, blocks: Mapping[int, nn.Module]) -> Factored | None:
        """What the group of a site makes of it, None if it shares nothing.

        Args:
            site: one of the job's.
            blocks: layer -> its block, those that are open already.
        """
        basis = self.plan.choices[site.name].basis
        if basis is None:
            return None
        if basis not in self._made:
            self._made[basis] = self._factors(basis, blocks)
        return self._made[basis].pop(site.name)

    def connect(self, made: Replacement) -> None:
        """Let the new layer of a site read its basis, or note it as the one that holds it; and say so in its row."""
        basis = self.plan.choices[made.site.name].basis
        if basis is None:
            return
        made.row.update(basis=basis, max_rank=made.row["curve"][-1][0])
        if not isinstance(made.module, SharedLowRankLinear):
            self._owners[basis] = made.module
            return
        owner: Any = self._owners.get(basis)
        if owner is None or owner.down.weight.is_meta:  # it has been written, or was by a run that was killed
            owner = self._owners[basis] = nn.Module()
            assert isinstance(made.factors, SharedLowRank)
            owner.down = linear(made.factors.A.to(self.job.source.dtype))  # rounded as stored already
        made.module.follow(owner)

    def _factors(self, basis: str, blocks: Mapping[int, nn.Module]) -> dict[str, Factored]:
        group = tuple(self.groups[basis])
        with _reading(self.job, self.store, _span(group), blocks) as read:
            parts = [read(site) for site in group]
            joint = _joint(self.job, self.store, group, parts)
            rank = self.plan.choices[basis].rank
            A, Bs = joint.cut([W for W, _ in parts], [g for _, g in parts], rank)
        made = {}
        for site, B, curve in zip(group, Bs, joint.losses, strict=True):
            factors = LowRank(B, A) if site.name == basis else SharedLowRank(B, A, basis)
            made[site.name] = Factored(factors, max(float(curve[rank]), 0.0), curve.clamp_min(0.0))
        return made


def _span(group: Iterable[Site]) -> tuple[int, ...]:
    """The visits in which the sites of a group lie."""
    return tuple(sorted({s.layer for s in group}))


@contextlib.contextmanager
def _reading(
    job: Job, store: StatisticsStore, span: Iterable[int], blocks: Mapping[int, nn.Module] | None = None
) -> Iterator[Callable[[Site], tuple[Tensor, Geometry]]]:
    """A function that gives a site's weight, in the precision of the work, and its geometry, in the dense model."""
    with contextlib.ExitStack() as stack:
        opened = dict(blocks or {})
        for layer in span:
            if layer not in opened:
                opened[layer] = stack.enter_context(job.source.block(layer))
        measured = {layer: results_of(job, store, layer, None) for layer in span}

        def read(site: Site) -> tuple[Tensor, Geometry]:
            W, _ = read_site(opened[site.layer], site, job.source.outline.local(site))
            geometry = site_geometry(job.recipe, measured[site.layer](site, {}))
            return W if W.dtype == torch.float64 else W.float(), geometry

        yield read


def _joint(job: Job, store: StatisticsStore, group: Group, parts: list[tuple[Tensor, Geometry]]) -> Joint:
    """The decomposition of a group, from the store if it has been made before."""
    spectral = job.recipe.factorize
    assert isinstance(spectral, Spectral)
    shares = None
    if job.recipe.currency == "relative":  # what is minimised is what the curves add up
        totals = [geometry.loss(W.double()) for W, geometry in parts]
        shares = [1.0 / total if total > 0 else 1.0 for total in totals]
    digest = hashlib.blake2b(repr(shares is None).encode(), digest_size=16)
    for W, geometry in parts:
        digest.update(fingerprint(W, geometry, spectral.precision).encode())
    layer, key = group[0].layer, f"joint-{digest.hexdigest()}"
    kept = store.load_spectrum(layer, key)
    if kept is not None:
        truncation = Truncation(kept["up"], kept["project"], kept["energy"], float(kept["total"]))
        return Joint(truncation, kept["losses"])
    found = decompose_jointly([W for W, _ in parts], [g for _, g in parts], shares, spectral)
    each = found.truncation
    total = torch.tensor(each.total, dtype=torch.float64)
    tensors = {"up": each.up, "project": each.project, "energy": each.energy, "total": total, "losses": found.losses}
    store.save_spectrum(layer, key, tensors)
    return found
