"""Hidden vectors inside blocks: where they are, which matrices make and read them, and what is left of these at fewer units.

In a feed-forward part the units are channels, in an attention part key-value heads with the query heads that read them. With
J the units that stay, every matrix that makes the vector keeps its rows J, and the one that reads it, W, becomes
V = W C[:, J] C_JJ^+ (`corank.linalg.narrowing`), in the metrics that factors of it are measured in too.

The metric of what the producers put out changes with what reads them: a gradient that comes back through V in place of W_J
is larger where V has taken over something. Its rows and columns are scaled by the root of what their unit now hands back,
tr(V_u^T R V_u) / tr(W_u^T R W_u), which is exact on the diagonal as long as gradients do not depend on what lies between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corank.engine.job import Job
from corank.factorize import Geometry
from corank.factorize.geometry import Metric
from corank.linalg.narrowing import Nested, columns_of, full, narrowed
from corank.model import Site
from corank.structured.shape import BlockShape, bound_to
from corank.structured.units import CHANNELS, HEADS, Units, find_units, sentences

TENFOLD = 10.0
"""Most by which the metric of an output is scaled: what was next to nothing before says little about what it is now."""


@dataclass(frozen=True)
class Hidden:
    """One hidden vector.

    Attributes:
        units: what it consists of.
        producers: the matrices that make it.
        consumer: the one that reads it, whose name is that of the vector.
    """

    units: Units
    producers: tuple[Site, ...]
    consumer: Site

    @property
    def name(self) -> str:
        """Name of the matrix that reads it."""
        return self.consumer.name

    @property
    def sites(self) -> tuple[Site, ...]:
        """All matrices that are narrowed with it, in the order in which they run."""
        return (*self.producers, self.consumer)

    @property
    def columns(self) -> int:
        """Length of the vector as its consumer reads it."""
        return self.units.count * self.units.size

    @property
    def dense(self) -> int:
        """Entries of all its matrices."""
        return sum(s.numel for s in self.sites)

    @property
    def per_unit(self) -> int:
        """Entries of all its matrices that go with a unit."""
        return self.dense // self.units.count

    def rows(self, site: Site, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a producer that units have, and which of the units each of them belongs to: int64, equally long."""
        rows, owners = [], []
        for part in self.units.producers:
            if site.name.endswith(f".{part.path}"):
                rows.append(part.start + columns_of(kept, part.size))
                owners.append(torch.arange(len(kept), device=kept.device).repeat_interleave(part.size))
        return torch.cat(rows), torch.cat(owners)

    def narrowed(self, site: Site, units: int) -> Site:
        """One of its sites at a number of units."""
        m, n = site.shape
        shape = (m, n // self.units.count * units) if site is self.consumer else (m // self.units.count * units, n)
        return dataclasses.replace(site, shape=shape)

    def after(self, shape: BlockShape, units: int) -> BlockShape:
        """The widths of its block at a number of units."""
        if self.units.kind == CHANNELS:
            return dataclasses.replace(shape, channels=units)
        return dataclasses.replace(shape, kv_heads=units, heads=units * self.units.heads[0])


@dataclass(frozen=True, eq=False)
class Part:
    """What is left of a matrix of a hidden vector.

    Attributes:
        site: with its new shape.
        W: [m, n].
        bias: [m], None for none.
        geometry: what an error of it costs now.
    """

    site: Site
    W: Tensor
    bias: Tensor | None
    geometry: Geometry


Given = Mapping[str, tuple[Tensor, Tensor | None, Geometry]]
"""Name of a site -> its weight, its bias and its geometry, as they were."""


def vectors_in(job: Job, layer: int, shape: BlockShape) -> tuple[list[Hidden], list[str]]:
    """The hidden vectors of a block that can be narrowed, and what is said of others.

    Args:
        job: what is done; vectors with a matrix that is not among its sites stay as they are.
        layer: number of the block.
        shape: its widths.
    """
    outline = job.source.outline
    path = outline.path(layer)
    sites = outline.in_layer(layer)
    found, skipped = find_units(job.source.model.get_submodule(path), sites, f"{path}.", job.source.config)
    mine = {s.name for s in job.in_layer(layer)}
    vectors = []
    for units in found:
        if units.kind not in (CHANNELS, HEADS) or units.count < 2:
            continue
        paths = dict.fromkeys(r.path for r in units.producers)
        members = [next(s for s in sites if s.name == f"{path}.{each}") for each in paths]
        consumer = next(s for s in sites if s.name == units.name)
        members.sort(key=sites.index)
        alone = sum(bound_to(s, shape, units.kind) for s in sites) == len(members) + 1  # the width is nobody else's
        if alone and {s.name for s in (*members, consumer)} <= mine:
            vectors.append(Hidden(units, tuple(members), consumer))
    return vectors, sentences(skipped, (CHANNELS, HEADS))


def parts_of(vector: Hidden, kept: Tensor, given: Given, V: Tensor | None = None) -> dict[str, Part]:
    """What is left of the matrices of a vector.

    Args:
        vector: which one.
        kept: units that stay, ascending.
        given: its matrices as they were.
        V: what the consumer becomes, if it is known.
    """
    W, bias, geometry = given[vector.name]
    size, count = vector.units.size, len(kept)
    columns = columns_of(kept, size)
    C = full(geometry.right.G, W)
    V = narrowed(W, C, columns) if V is None else V
    site = vector.narrowed(vector.consumer, count)
    inner = dataclasses.replace(geometry, right=Metric(C[columns][:, columns]))
    parts = {vector.name: Part(site, _like(V, W), bias, inner)}
    scale = _scale(W.double()[:, columns], V, geometry.R, size)
    for producer in vector.producers:
        W, bias, geometry = given[producer.name]
        rows, owners = vector.rows(producer, kept)
        R, factor = geometry.R, scale[owners]
        if R is not None:
            R = R[rows] * factor.square() if R.ndim == 1 else R[rows][:, rows] * factor * factor[:, None]
        parts[producer.name] = Part(
            vector.narrowed(producer, count),
            _like(W[rows], W),
            None if bias is None else bias[rows],
            dataclasses.replace(geometry, R=R),
        )
    return parts


def _scale(W: Tensor, V: Tensor, R: Tensor | None, size: int) -> Tensor:
    """By how much larger gradients come back to each unit: float64 [units]."""

    def handed_back(A: Tensor) -> Tensor:
        return (A * (A if R is None else R.double() @ A)).sum(0).view(-1, size).sum(1)

    before, after = handed_back(W), handed_back(V)
    ratio = torch.where(before > 0, after / before.clamp_min(torch.finfo(torch.float64).tiny), torch.ones_like(before))
    return ratio.clamp_min(0).sqrt().clamp_max(TENFOLD)


def _like(A: Tensor, W: Tensor) -> Tensor:
    """In the precision of the work: float64 for float64 weights, else float32."""
    return A if W.dtype == torch.float64 else A.float()


def spread(V: Tensor, kept: Tensor, vector: Hidden) -> Tensor:
    """The matrix [m, n] that reads the whole vector and does with it what V does with the units that stay."""
    out = V.new_zeros(len(V), vector.columns)
    out[:, columns_of(kept, vector.units.size)] = V
    return out


def row_of(vector: Hidden, part: Part, kept: Tensor, given: Given, nested: Nested, made: Any) -> dict[str, Any]:
    """The report's row of a matrix of a narrowed vector.

    Args:
        vector: which one.
        part: what was left of the matrix.
        kept: units that stay.
        given: the matrices as they were.
        nested: what narrowing was predicted to lose.
        made: `corank.engine.site.Replacement` if the rest was factorized, else None; None for none.
    """
    old = next(s for s in vector.sites if s.name == part.site.name)
    row: dict[str, Any] = {
        "name": old.name,
        "role": old.role,
        "layer": old.block,
        "kind": "narrow",
        "rank": min(part.site.shape),
        "params": part.site.numel,
        "flops": part.site.flops,
        "loss": 0.0,
        "predicted_loss": 0.0,
        "curve": [],
    }
    if part.geometry.R is not None:
        row["predicted_nats"] = 0.0
    if made is not None:
        row |= made.row
    row |= {
        "shape": list(old.shape),
        "max_rank": min(old.shape),
        "params_dense": old.numel,
        "flops_dense": old.flops,
        "becomes": {"layer": old.block, "shape": list(part.site.shape)},
    }
    if old.name != vector.name:
        return row
    W, _, geometry = given[vector.name]
    stored = part.W if made is None else made.factors.astype(torch.float64).dense()
    total = geometry.loss(W.double())
    further = (row["predicted_loss"] ** 2) * part.geometry.loss(part.W.double())
    predicted = float(nested.loss[len(kept)]) + further
    realised = geometry.loss(W.double() - spread(stored.double(), kept, vector))
    scale = total if total > 0 else 1.0
    row |= {"loss": (realised / scale) ** 0.5, "predicted_loss": (predicted / scale) ** 0.5}
    if geometry.R is not None:
        row["predicted_nats"] = predicted / 2
    return row
