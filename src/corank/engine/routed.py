"""Statistics of experts, which see only the tokens that are routed to them, and some see too few.

An expert's own statistics are used as they are from 4 n tokens on, n being the size of its input. Below, they are
filled up to 4 n tokens with those of the layer: for a matrix that reads the layer's input, the inputs of all experts;
for the matrix behind it, what the expert itself would make of a sample of the layer's tokens, whoever they are routed
to. (The inner channels of different experts have nothing to do with each other.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from corank.engine.store import Table
from corank.engine.world import World
from corank.factors import ExpertList
from corank.model import Site
from corank.statistics import Statistic

ENOUGH = 4
"""Tokens per input channel from which on an expert's own statistics stand alone."""
SAMPLE = 8192
"""Tokens of the layer that an expert is shown at most where it has seen too few of its own."""
PRIOR = "#prior"
"""Suffix of the owner of statistics on tokens that are not the expert's own."""


def is_inner(site: Site) -> bool:
    """Whether a site reads what the expert itself has computed, not the layer's input."""
    return site.pool is not None and site.pool.endswith(":down")


def mixture_of(local: str) -> tuple[str, int]:
    """("mlp.experts", 3) for ``mlp.experts.3.down``."""
    path, number, _ = local.rsplit(".", 2)
    return path, int(number)


class Sampler:
    """Collects evenly spaced rows of the input of a mixture, batch by batch.

    Args:
        rows: wanted in all.
        batches: in which they come.
    """

    def __init__(self, rows: int, batches: int):
        self.per_batch = -(-min(rows, SAMPLE) // max(batches, 1))
        self.latest: Tensor | None = None

    def __call__(self, x: Tensor, mask: Tensor | None) -> None:
        """Take rows of x [..., d], where `mask` [...] is True."""
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        step = max(len(rows) // self.per_batch, 1)
        self.latest = rows[::step][: self.per_batch].clone()  # the whole need not stay alive


class Needs:
    """Which experts are to be shown a sample of which batches: those that are behind on tokens of their own then.

    It is decided when all batches are through, because other processes may have had the ones before.

    Args:
        numbers: the batches of this process.
        total: batches of all processes.
    """

    def __init__(self, numbers: range, total: int):
        self.numbers, self.total = numbers, total
        self._seen: dict[str, list[float]] = {}

    def note(self, group: str, statistics: Iterable[Statistic]) -> None:
        """Note what an expert has seen up to and with the current batch; its own statistics tell."""
        self._seen.setdefault(group, []).append(min((s.count for s in statistics), default=math.inf))

    def batches(self, sites: Mapping[str, Site], world: World) -> dict[str, list[int]]:
        """Group -> batches of this process, counted from 0, of which its expert needs a sample.

        Args:
            sites: by group, inner matrices of experts.
            world: the processes; all have to ask.
        """
        ends = world.gather({group: seen[-1] for group, seen in self._seen.items()})
        found = {}
        for group, site in sites.items():
            before = sum(end[group] for end in ends[: world.rank])
            due = [ENOUGH * site.shape[1] * (number + 1) / self.total for number in self.numbers]
            found[group] = [i for i, seen in enumerate(self._seen[group]) if before + seen < due[i]]
        return found


def inner_rows(block: nn.Module, path: str, number: int, rows: Tensor) -> Tensor:
    """What an expert of the mixture at `path` makes of rows [rows, d] of its layer's input."""
    mixture = block.get_submodule(path)
    assert isinstance(mixture, ExpertList)
    with torch.no_grad():
        return mixture.inner(number, rows)


def filled(own: Statistic, prior: Statistic, enough: int) -> Statistic:
    """`own`, filled up to `enough` tokens with the mean of `prior`; itself if it has them or there is no prior."""
    if own.count >= enough or prior.count == 0:
        return own
    weight = (enough - own.count) / prior.count
    mine, other = own.state(), prior.state()
    state = {name: mine[name].to(other[name].device) + weight * other[name] for name in own.axes}
    return type(own).from_state({**state, "count": torch.tensor(enough)})


class Pools:
    """The statistics of a block's groups, those of experts filled up.

    Args:
        table: group -> name of the statistic -> statistic, as measured.
        sites: of the block; statistics are pooled over those that the table has.
    """

    def __init__(self, table: Table, sites: Iterable[Site]):
        self._table = table
        self._groups: dict[str, list[str]] = {}
        for site in sites:
            if site.pool is not None and site.group in table and site.group not in self._groups.get(site.pool, []):
                self._groups.setdefault(site.pool, []).append(site.group)
        self._pooled: dict[tuple[str, str], Statistic] = {}

    def of(self, site: Site) -> dict[str, Statistic]:
        """Name -> statistic of a site's input."""
        own = self._table.get(site.group, {})
        if site.pool is None:
            return own
        enough = ENOUGH * site.shape[1]
        return {name: filled(s, self._prior(site, name), enough) for name, s in own.items()}

    def _prior(self, site: Site, name: str) -> Statistic:
        if is_inner(site):
            return self._table[site.group + PRIOR][name]
        assert site.pool is not None
        if (site.pool, name) not in self._pooled:
            first, *others = (self._table[group][name] for group in self._groups[site.pool])
            pooled = type(first).from_state(first.state())
            for other in others:
                pooled.merge(other)
            self._pooled[site.pool, name] = pooled
        return self._pooled[site.pool, name]
