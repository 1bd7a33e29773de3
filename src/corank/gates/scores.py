"""The order in which gates closed, as scores: one map from which any size can be made (ACIP, arXiv:2502.01717).

    open gate     score = its parameter (of hard concrete gates P(z > 0))
    closed gate   score = 0 when it closes, and one less after every further step

so that the lowest scores are those that went first. Whatever has been trained with gates, a smaller model is what is left
after the units with the lowest scores are gone, however many that are: the kept sets of two sizes are nested.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from corank.errors import CorankError
from corank.gates.gate import Gates

FORMAT = "corank-scores-1"


class Priced(Protocol):
    """What stored units cost: every `corank.gates.Place`, and every `Costs`."""

    def cost(self, kept: int) -> int:
        """Parameters stored for so many units; never falling."""
        ...


@dataclass(frozen=True)
class Costs:
    """Parameters stored for so many units, by a function."""

    cost: Callable[[int], int]


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """Scores of units.

    Attributes:
        scores: name of a gate vector -> float64 [n], on the CPU.
        ties: the same, by which units of equal scores are ordered; those without come in the order of names and numbers.

    Raises:
        CorankError: a score is not finite.
    """

    scores: dict[str, Tensor]
    ties: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, score in self.scores.items():
            if not bool(torch.isfinite(score).all()):
                raise CorankError(f"The scores of {name} are not finite; train with a smaller learning rate.")

    def order(self) -> list[tuple[str, int]]:
        """All units (name, number), those that stay longest first."""
        names = list(self.scores)
        second = torch.cat([self.ties.get(name, torch.zeros(len(self.scores[name]))).double() for name in names])
        every = torch.cat([self.scores[name].double() for name in names])
        owner = torch.cat([torch.full((len(self.scores[name]),), i) for i, name in enumerate(names)])
        number = torch.cat([torch.arange(len(self.scores[name])) for name in names])
        best = second.argsort(descending=True, stable=True)
        best = best[every[best].argsort(descending=True, stable=True)]
        return [(names[i], int(j)) for i, j in zip(owner[best].tolist(), number[best].tolist(), strict=True)]

    def kept(self, places: Mapping[str, Priced], limit: int, least: int | Mapping[str, int] = 0) -> dict[str, Tensor]:
        """The units that stay if their parameters are not to exceed a limit: as many of the first of `order` as fit.

        Args:
            places: name -> what so many units of it cost.
            limit: parameters of all places.
            least: units that every place, or each by its name, keeps whatever their scores.

        Returns:
            name -> their numbers, ascending, int64.

        Raises:
            CorankError: not even the least fits.
        """
        order = self.order()
        spared: dict[str, set[int]] = {name: set() for name in self.scores}
        for name, number in order:
            if len(spared[name]) < (least if isinstance(least, int) else least.get(name, 0)):
                spared[name].add(number)
        order = [(name, number) for name, number in order if number not in spared[name]]
        counts = {name: len(numbers) for name, numbers in spared.items()}
        total = sum(places[name].cost(count) for name, count in counts.items())
        if total > limit:
            raise CorankError(
                f"The size asked for leaves {limit:,} parameters to what can be pruned, but {total:,} have to stay; keep more."
            )
        fits = 0
        for at, (name, _) in enumerate(order, start=1):  # costs never fall, so the first that does not fit is the end
            total += places[name].cost(counts[name] + 1) - places[name].cost(counts[name])
            counts[name] += 1
            if total > limit:
                break
            fits = at
        kept = {name: set(numbers) for name, numbers in spared.items()}
        for name, number in order[:fits]:
            kept[name].add(number)
        return {name: torch.tensor(sorted(numbers), dtype=torch.int64) for name, numbers in kept.items()}

    def ranked(self) -> dict[str, Tensor]:
        """Name -> its units, those that stay longest first, int64 [n]."""
        found: dict[str, list[int]] = {name: [] for name in self.scores}
        for name, number in self.order():
            found[name].append(number)
        return {name: torch.tensor(numbers, dtype=torch.int64) for name, numbers in found.items()}

    def take(self, units: Mapping[str, Tensor]) -> ScoreMap:
        """The map of some units alone, numbered anew in the order given."""
        ties = {name: tie[units[name]] for name, tie in self.ties.items()}
        return ScoreMap({name: score[units[name]] for name, score in self.scores.items()}, ties)

    def save(self, file: Path, *, about: Mapping[str, str] | None = None, **tensors: Tensor) -> None:
        """Write a safetensors file: the scores, texts about them, and other tensors beside them."""
        held = {f"score/{name}": score for name, score in self.scores.items()}
        held |= {f"tie/{name}": tie for name, tie in self.ties.items()}
        content = {k: v.detach().cpu().contiguous() for k, v in {**held, **tensors}.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(file.name + ".partial")
        save_file(content, unfinished, metadata={**(about or {}), "format": FORMAT})
        os.replace(unfinished, file)

    @classmethod
    def load(cls, file: Path) -> tuple[ScoreMap, dict[str, Tensor], dict[str, str]]:
        """The inverse of `save`: (scores, other tensors, texts).

        Raises:
            CorankError: it cannot be read, or is something else.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                about = dict(opened.metadata() or {})
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:
            raise CorankError(f"The scores {file} cannot be read: {error}") from None
        if about.pop("format", None) != FORMAT:
            raise CorankError(f"{file} holds no scores of this version ({FORMAT}).")
        parts: dict[str, dict[str, Tensor]] = {"score": {}, "tie": {}}
        for key in [k for k in tensors if k.startswith(("score/", "tie/"))]:
            kind, _, name = key.partition("/")
            parts[kind][name] = tensors.pop(key)
        return cls(parts["score"], parts["tie"]), tensors, about


class Recorder:
    """Scores in the making: a companion of `corank.gates.train`.

    Args:
        gates: whose scores; a gate is closed if its value without chance is 0.

    Attributes:
        closed: name -> steps since a gate closed, int64 [n]; -1 while it is open.
    """

    def __init__(self, gates: Gates):
        self.gates = gates
        self.closed = {n: torch.full((len(p),), -1, dtype=torch.int64) for n, p in gates.theta.items()}

    def before(self, step: int) -> None:
        """Nothing."""

    def after(self, step: int, values: Mapping[str, Tensor]) -> bool:
        """One step more for those that are closed; a gate that has opened again begins anew."""
        for name, closed in self.closed.items():
            theta = values[f"gate.{name}"].detach()
            is_open = (self.gates.relax[name].value(theta) > 0).cpu()
            self.closed[name] = torch.where(is_open, torch.full_like(closed, -1), closed + 1)
        return False

    def state(self) -> dict[str, Any]:
        """`closed`."""
        return dict(self.closed)

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.closed = {name: state[name].clone() for name in self.closed}

    def scores(self) -> ScoreMap:
        """The map as it is now."""
        found = {}
        for name, closed in self.closed.items():
            theta = self.gates.theta[name].detach().double().cpu()
            found[name] = torch.where(closed < 0, self.gates.relax[name].score(theta), -closed.double())
        return ScoreMap(found)
