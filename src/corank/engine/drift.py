"""What a block's matrices read in the compressed model, and jointly with what they read in the dense one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from corank.engine.forms import new_statistics, take_in
from corank.engine.job import Job
from corank.engine.routed import ENOUGH, PRIOR, Needs, Sampler, inner_rows, is_inner, mixture_of
from corank.engine.store import Table
from corank.engine.stream import Stream
from corank.factors import ExpertList, patches
from corank.model import Site
from corank.statistics import CrossGram

Seen = dict[str, tuple[Tensor, Tensor | None]]
"""Path inside the block -> its input and the mask of the rows that count."""


def observe_drift(
    job: Job,
    original: nn.Module,
    block: nn.Module,
    layer: int,
    leaders: dict[str, Site],
    dense: Stream | None,
    drifted: Stream,
) -> tuple[Table, Table]:
    """Measure groups that do not depend on each other, in one pass over the data.

    For an anchored target the compressed model's experts are given the tokens that the dense model routes to them: the
    same tokens have to be compared.

    Args:
        job: what is to be done.
        original: the block with its dense weights.
        block: the block with the groups before these compressed.
        layer: its index.
        leaders: group -> the site that stands for it.
        dense, drifted: the streams of the two models; the dense one is needed for an anchored target.

    Returns:
        (statistics of the drifted inputs, joint statistics under the name "cross" or nothing), by group.
    """
    recipe, plan = job.recipe, job.source.outline
    names = (job.of_inputs if recipe.drifted else set()) | ({"gram"} if recipe.refits else set())
    anchored = recipe.anchored and dense is not None
    seen: Table = {}
    cross: Table = {}
    samplers: dict[str, Sampler] = {}
    for group, site in leaders.items():
        for owner in (group, group + PRIOR) if is_inner(site) else (group,):
            seen[owner] = new_statistics(names, site)
            if anchored:
                cross[owner] = {"cross": CrossGram(site.shape[1])}
        if is_inner(site):
            path = mixture_of(plan.local(site))[0]
            samplers.setdefault(path, Sampler(ENOUGH * site.shape[1], drifted.total))
    paths = [*map(plan.local, leaders.values()), *samplers]
    needs = Needs(drifted.numbers, drifted.total)
    rows: dict[str, list[tuple[Tensor | None, Tensor]]] = {path: [] for path in samplers}
    for i in range(len(drifted)):
        before = _inputs(dense, original, layer, i, paths) if anchored and dense is not None else {}
        with _routed_alike(block, original if anchored else None):
            after = _inputs(drifted, block, layer, i, paths)
        for group, site in leaders.items():
            local = plan.local(site)
            if local in after:
                _add(seen, cross, group, site, block.get_submodule(local), before.get(local), after[local])
            if is_inner(site):
                needs.note(group, [*seen[group].values(), *cross.get(group, {}).values()])
        for path, sampler in samplers.items():
            both = [None if path not in inputs else _sampled(sampler, inputs[path]) for inputs in (before, after)]
            assert both[1] is not None
            rows[path].append((both[0], both[1]))
    inner = {group: site for group, site in leaders.items() if is_inner(site)}
    wanted = needs.batches(inner, job.world) if inner else {}
    for group, site in inner.items():  # the same tokens in both models
        path, number = mixture_of(plan.local(site))
        for x, z in (rows[path][i] for i in wanted[group]):
            dense_inner = None if x is None else (inner_rows(original, path, number, x), None)
            _add(seen, cross, group + PRIOR, site, block, dense_inner, (inner_rows(block, path, number, z), None))
    return seen, cross


def _inputs(stream: Stream, block: nn.Module, layer: int, i: int, paths: list[str]) -> Seen:
    found: Seen = {}

    def note(path: str) -> Any:
        return lambda x, mask: found.__setitem__(path, (x, mask))

    stream.observe(block, layer, i, {path: note(path) for path in paths}, stop=True)
    return found


def _add(
    seen: Table,
    cross: Table,
    owner: str,
    site: Site,
    layer: nn.Module,
    before: tuple[Tensor, Tensor | None] | None,
    after: tuple[Tensor, Tensor | None],
) -> None:
    for statistic in seen[owner].values():
        take_in(statistic, site, layer, *after)
    for joint in cross.get(owner, {}).values():
        assert before is not None
        x, z, mask = before[0], after[0], after[1]
        if site.form == "conv":
            x, z, mask = patches(layer, x), patches(layer, z), None
        joint.update(x, z, mask)


def _sampled(sampler: Sampler, given: tuple[Tensor, Tensor | None]) -> Tensor:
    sampler(*given)
    assert sampler.latest is not None
    return sampler.latest


@contextlib.contextmanager
def _routed_alike(block: nn.Module, original: nn.Module | None) -> Iterator[None]:
    """Route the tokens in `block` as they were routed in `original` just now."""
    pairs = []
    for path, mixture in block.named_modules():
        if original is not None and isinstance(mixture, ExpertList):
            pairs.append((mixture, original.get_submodule(path).index))
    try:
        for mixture, index in pairs:
            mixture.forced = index  # type: ignore[assignment]
        yield
    finally:
        for mixture, _ in pairs:
            mixture.forced = None
