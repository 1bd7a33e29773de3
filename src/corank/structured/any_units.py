"""One score map of channels and heads, and a model of any size from it, in the native format.

ACIP's gates (arXiv:2502.01717) on units in place of components: a straight-through gate multiplies each, a penalty closes them, and
the order in which they close is the order in which they go (`corank.gates`). A unit that is gone saves what it costs,
where a component saves nothing until a matrix has lost half of its rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from corank.errors import CorankError, unknown
from corank.gates import Gates, Plain, Recorder, StraightThrough
from corank.gates.any_size import UnitMap
from corank.gates.components import prior
from corank.gates.scores import Costs, ScoreMap
from corank.gates.shrinking import Shrinking, rate
from corank.heal.distillation import predictions
from corank.learning import LOSSES
from corank.structured.l0 import FirstOrder
from corank.structured.learning import Case, Learned, Masks, take_out
from corank.structured.plan import Plan
from corank.structured.task import Task

LOOK = 0.2
"""Share of the steps that tell in which order the gates begin."""


@dataclass(frozen=True)
class AnyUnits:
    """Train a score map of units and take out those with the lowest scores; see `Structured.learn`.

    Attributes:
        steps: of training.
        minutes: its end by the clock, None for none.
        to: training ends when this share of what units hold is left.
        loss: "kd", the divergence from the dense model's predictions, or "text".

    Raises:
        CorankError: a value out of range.
    """

    steps: int
    minutes: float | None = None
    to: float = 0.4
    loss: str = "kd"

    always = True
    """A map is wanted even where nothing is to be taken out."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if self.steps < 2 or not 0 < self.to < 1 or (self.minutes is not None and not self.minutes > 0):
            raise CorankError("steps must be at least 2, to between 0 and 1, and minutes more than zero.")

    def __call__(self, task: Task, plan: Plan, work: Path | None) -> Learned:
        """Train, and take out; the model is changed in place."""
        case = Case.of(task, plan, work)
        if not case.fields:
            raise CorankError("None of the units can be taken out of these blocks; take whole blocks away (shortgpt).")
        return materialised(case, self._map(case))

    def _map(self, case: Case) -> ScoreMap:
        places = [f.place for f in case.fields]
        dtype = torch.promote_types(case.source.dtype, torch.float32)
        look = max(round(LOOK * self.steps), 1)
        count = max(self.steps - look, 1)
        taught = predictions(case.source, case.data, batch=case.task.batch) if self.loss == "kd" else None
        plain = Gates(places, Plain(), dtype, case.source.device)
        watch = FirstOrder(plain)
        # of the loss on the text: a divergence from the model itself has no first order
        case.train("first-order", plain, look, self._share(look), 1e-4, rates={"gate.": 0.0}, companions=[watch])
        first = prior({name: s / case.sizes.each[name] for name, s in watch.sums.items()})
        gates = Gates(places, StraightThrough(), dtype, case.source.device)
        with torch.no_grad():
            for name, theta in gates.theta.items():
                theta.copy_(first[name])
        shrinking, recorder = Shrinking(gates, self.to, count), Recorder(gates)
        companions = [recorder, shrinking]
        case.train(
            "gates", gates, count, self._share(count), rate(count), taught, penalty=shrinking, companions=companions
        )
        return ScoreMap(recorder.scores().scores, first)

    def _share(self, count: int) -> float | None:
        return None if self.minutes is None else self.minutes * count / self.steps


@dataclass(frozen=True)
class FromMap:
    """Take out units by a map that is there; nothing is learned.

    Attributes:
        map: of the units of the model.
    """

    map: ScoreMap

    always = True

    def __call__(self, task: Task, plan: Plan, work: Path | None) -> Learned:
        """Take out; the model is changed in place."""
        case = Case.of(task, plan, work, trains=False)
        known = {f.units.name: len(self.map.scores.get(f.units.name, ())) for f in case.fields}
        if any(known[f.units.name] != f.units.count for f in case.fields):
            raise CorankError("The score map is not that of this model's units; make the directory again.")
        if not known:
            raise CorankError("Every hidden vector has one unit left; there is nothing more to be taken out.")
        # a vector with one unit left has no choice any more
        scores, ties = ({n: part[n] for n in known if n in part} for part in (self.map.scores, self.map.ties))
        return materialised(case, ScoreMap(scores, ties))


def materialised(case: Case, scores: ScoreMap) -> Learned:
    """The smaller model, and its own map."""
    kept = chosen(case, scores)
    counts = {f.units.name: f.units.count for f in case.fields}
    made = take_out(case, Masks.hard(kept, counts))
    # at the dense size nothing is lost; in between, what the steps of widths have left free belongs to it
    limit = min(case.sizes.limit - case.sizes.outside, case.sizes.dense - case.sizes.outside)
    return dataclasses.replace(made, map=UnitMap(scores.take(kept), limit))


def chosen(case: Case, scores: ScoreMap) -> dict[str, Tensor]:
    """The units that stay within the budget, name -> numbers, ascending: nested between budgets.

    With `uniform` all blocks keep as many of a kind: the j-th best units of all blocks go together, by their mean score.
    """
    parts = {f.units.name: f.part for f in case.fields}
    groups = {name: f"{p.kind}" if case.task.recipe.uniform else name for name, p in parts.items()}
    names: dict[str, list[str]] = {}
    for name, group in groups.items():
        names.setdefault(group, []).append(name)
    ranked, ties, costs, least = {}, {}, {}, {}
    for group, members in names.items():
        if case.task.recipe.uniform and (
            len(members) != len(case.blocks) or len({parts[n].count for n in members}) > 1
        ):
            raise CorankError(
                f"uniform=true needs {group} that can be narrowed in all {len(case.blocks)} blocks, and as many in each."
            )
        order = scores.ranked()
        ranked[group] = torch.stack([scores.scores[n][order[n]] for n in members]).mean(0)
        ties[group] = torch.stack([scores.ties[n][order[n]] for n in members]).mean(0)
        each = sum(parts[n].cost for n in members)
        first = parts[members[0]]
        # a width is paid for by steps
        costs[group] = Costs(lambda k, each=each, p=first: each * p.above(k))  # type: ignore[misc]
        least[group] = first.down(0)
    counts = {g: len(k) for g, k in ScoreMap(ranked, ties).kept(costs, case.sizes.room(), least).items()}
    best = scores.ranked()
    found = {}
    for name, group in groups.items():
        part = parts[name]
        found[name] = (
            best[name][: part.above(counts[group]) if counts[group] < part.count else part.count].sort().values
        )
    return found
