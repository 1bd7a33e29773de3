"""What a directory keeps so that smaller models can be made of it without a gradient, a decomposition or any data.

    any-size/scores.safetensors    for every matrix, of the components that are there, those that stay longest first:
                                   score/, tie/ [k], energy/ [k + 1] (what each carries, and what all of them lack)
                                   up/ [m, k] of matrices that are not stored as two factors, whose columns are in this order;
                                   project/ [k, m] where that is not the transposed

and in that of a model whose blocks have lost units, of each vector score/ and tie/ of the units that are there, in their
order. A pair of factors B A is cut to B[:, :r] A[:r], any other matrix W' to up[:, :r] (project[:r] W').
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.factors import KINDS, LowRank, LowRankLinear, packed, weight_of
from corank.gates.components import Scored
from corank.gates.scores import ScoreMap
from corank.recipe import Recipe

UNITS = "units"
FILE = Path("any-size") / "scores.safetensors"
"""In a folder of its own: what reads a model reads all safetensors files beside its configuration."""


@dataclass(frozen=True, eq=False)
class Map:
    """The score map of a directory.

    Attributes:
        scores: matrix -> scores of its components, those that stay longest first.
        kind: of the factors that are stored where they are smaller than the matrix.
        limit: parameters of all matrices that it is good for, at most.
        energy: matrix -> what every component carries in the metric, and then what all of them together lack [k + 1].
        up, project: of matrices that are not stored as two factors; project only where it is not the transposed.
    """

    scores: ScoreMap
    kind: str
    limit: int
    energy: dict[str, Tensor]
    up: dict[str, Tensor]
    project: dict[str, Tensor]

    def cost(self, rank: int, shape: tuple[int, int]) -> int:
        """Stored values of a matrix [m, n] at a rank."""
        return min(KINDS[self.kind][0].count(*shape, rank), shape[0] * shape[1])

    def cut(self, name: str, layer: nn.Module, rank: int) -> nn.Module:
        """The layer with the first `rank` of its components."""
        bias: Any = getattr(layer, "bias", None)
        if isinstance(layer, LowRankLinear):
            B, A = layer.factors().pair()
            return LowRank(B[:, :rank], A[:rank]).module(bias)
        W = weight_of(layer)
        wide = torch.promote_types(W.dtype, torch.float32)
        up = self.up[name].to(W.device, wide)
        project = self.project[name].to(W.device, wide) if name in self.project else up.mT
        made = LowRank(up[:, :rank], project[:rank] @ W.to(wide))
        factors = packed(made) if self.kind == "row_pivoted" else made
        return factors.astype(W.dtype).module(bias)

    def loss(self, name: str, rank: int) -> float:
        """||L (W - W') S|| / ||L W S|| of a matrix at a rank."""
        energy = self.energy[name].clamp_min(0)
        total = float(energy.sum())
        return (float(energy[rank:].sum()) / total) ** 0.5 if total > 0 else 0.0

    def reduced(self, kept: Mapping[str, int], model: nn.Module, limit: int) -> Map:
        """The map of what has been made smaller.

        Args:
            kept: matrix -> components that are left.
            model: the smaller model.
            limit: parameters of all its matrices, at most.
        """
        units = {name: torch.arange(rank) for name, rank in kept.items()}
        bare = [name for name in self.up if not isinstance(model.get_submodule(name), LowRankLinear)]
        energy = {n: torch.cat([e[: kept[n]], e[kept[n] :].sum()[None]]) for n, e in self.energy.items()}
        return Map(
            self.scores.take(units),
            self.kind,
            limit,
            energy,
            {name: self.up[name][:, : kept[name]] for name in bare},
            {name: self.project[name][: kept[name]] for name in bare if name in self.project},
        )

    def save(self, directory: Path) -> None:
        """Write it into a model directory."""
        parts = {"energy": self.energy, "up": self.up, "project": self.project}
        tensors = {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}
        about = {"about": json.dumps({"kind": self.kind, "limit": self.limit})}
        self.scores.save(directory / FILE, about=about, **tensors)


@dataclass(frozen=True, eq=False)
class UnitMap:
    """The score map of a directory whose hidden vectors can lose units.

    Attributes:
        scores: name of a hidden vector -> scores of its units, as they come.
        limit: parameters of all matrices of the blocks that it is good for, at most.
    """

    scores: ScoreMap
    limit: int

    def save(self, directory: Path) -> None:
        """Write it into a model directory."""
        self.scores.save(directory / FILE, about={"about": json.dumps({"kind": UNITS, "limit": self.limit})})


def load_map(directory: Path) -> Map | UnitMap:
    """The map of a model directory, whatever it is of.

    Raises:
        CorankError: it has none, or one that cannot be read.
    """
    if not (directory / FILE).is_file():
        raise CorankError(
            f"{directory} has no score map ({FILE}), from which any size could be made; "
            f"`corank compress MODEL --method acip --keep 0.9 --out DIR` makes a directory with one."
        )
    scores, tensors, texts = ScoreMap.load(directory / FILE)
    parts: dict[str, dict[str, Tensor]] = {"energy": {}, "up": {}, "project": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    about = json.loads(texts.get("about", "{}"))
    if about.get("kind") == UNITS and "limit" in about:
        return UnitMap(scores, int(about["limit"]))
    if not {"kind", "limit"} <= about.keys() or parts["energy"].keys() != scores.scores.keys():
        raise CorankError(f"{directory / FILE} is not whole; make the directory again.")
    return Map(scores, about["kind"], int(about["limit"]), parts["energy"], parts["up"], parts["project"])


def map_of(scored: Scored | None, recipe: Recipe, limit: int | None, dtype: torch.dtype) -> Map | None:
    """What a run that has trained a score map leaves behind; None if it has not, or if other sizes need more than that.

    Args:
        scored: the map and the components.
        recipe: what was done with them; where factors are fitted afterwards, a smaller size would be another fit.
        limit: parameters of all matrices.
        dtype: of what is stored.
    """
    if scored is None or limit is None or recipe.sequential or recipe.affine:
        return None
    kept = scored.kept
    up, project, energy = {}, {}, {}
    for name, truncation in scored.truncations.items():
        k = kept[name]
        carried = truncation.energy[:k].double().cpu()
        lacking = max(truncation.total - float(carried.sum()), 0.0) if k < len(truncation.energy) else 0.0
        energy[name] = torch.cat([carried, torch.tensor([lacking], dtype=torch.float64)])
        if recipe.kind == "low_rank" and k < min(truncation.up.shape[0], len(truncation.energy)):
            continue  # it is stored as two factors
        up[name] = truncation.up[:, :k].to(dtype)
        if not torch.equal(truncation.project, truncation.up.mT):
            project[name] = truncation.project[:k].to(dtype)
    units = {name: torch.arange(k) for name, k in kept.items()}
    return Map(scored.map.take(units), recipe.kind, limit, energy, up, project)
