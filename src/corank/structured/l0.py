"""Masks learned by gates with a chance: hard concrete gates under a Lagrangian (Compresso, arXiv:2310.05015; CoFi).

    min over gates and adapters, max over l1, l2:   loss(z) + l1 (s - t) + l2 (s - t)^2
    s = 1 - E[parameters] / parameters,  E[parameters] = E[hidden] / d * (sum over units E[z_u > 0] cost_u + rest)

With few steps gates cannot learn from chance alone which units matter: they begin in the order of |dloss / dg_u| per parameter,
measured in the first steps with all gates at 1 (prior="first-order"). The target t rises to the budget over the first half. At
the end one shift of all gates makes the expected size the budget to the last parameter; every hidden vector keeps the expected
number of its units, those with the largest gates, and at the values that these have without chance. For the last steps gates
stay as they are and the adapters alone train.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError, unknown
from corank.gates import Gates, HardConcrete, Lagrangian, Plain
from corank.gates.components import prior
from corank.heal.distillation import predictions
from corank.structured.allocation import Part, counts_of, size
from corank.structured.gated import HIDDEN, hidden_place
from corank.structured.hidden import selectable, step_of
from corank.structured.learning import Adapters, Case, Learned, Masks, adapters, take_out
from corank.structured.plan import Plan
from corank.structured.residual import residual_moment, rotate
from corank.structured.task import Task

LIMIT = math.log(100.0)
"""log_alpha stays within [-LIMIT, LIMIT]."""
FAR = 16.0
"""What log_alpha could move in all steps: from open for certain to closed for certain, and back."""
FASTEST = 1.0
"""Largest learning rate of log_alpha."""
LOOK = 0.2
"""Share of the steps that the first order takes."""
NEAREST = 1.0
"""log_alpha that the least of all units begins with."""
PRIORS = ("first-order", "none")
SOFTEST = 0.1
"""Lowest gate of a unit that stays."""


class Clamp:
    """Keeps log_alpha of all gates within limits; a companion of the training."""

    def before(self, step: int) -> None:
        """Nothing."""

    def after(self, step: int, values: Mapping[str, Tensor]) -> bool:
        """Clamp."""
        with torch.no_grad():
            for name, theta in values.items():
                if name.startswith("gate."):
                    theta.clamp_(-LIMIT, LIMIT)
        return False

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class FirstOrder:
    """Adds up |dloss / dg| of every gate; a companion of a training in which nothing moves.

    Attributes:
        sums: name -> float64 [n].
    """

    def __init__(self, gates: Gates):
        self.sums = {name: torch.zeros(len(p), dtype=torch.float64) for name, p in gates.theta.items()}

    def before(self, step: int) -> None:
        """Nothing."""

    def after(self, step: int, values: Mapping[str, Tensor]) -> bool:
        """Add."""
        for name in self.sums:
            gradient = values[f"gate.{name}"].grad
            if gradient is not None and bool(torch.isfinite(gradient).all()):
                self.sums[name] = self.sums[name] + gradient.detach().double().abs().cpu()
        return False

    def state(self) -> dict[str, Any]:
        """The sums."""
        return dict(self.sums)

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.sums = {name: state[name].clone() for name in self.sums}


@dataclass(frozen=True)
class L0:
    """Learn masks of channels and heads, and of the residual stream; see `corank.structured.recipe.Structured.learn`.

    Attributes:
        steps: of training.
        minutes: its end by the clock, None for none.
        rank: of the adapters that train beside the gates; 0: none.
        roles: of the matrices that have adapters.
        rate: learning rate of the adapters.
        hidden: dimensions of the residual stream may go, where the model and the recipe allow it.
        principal: the residual stream is first written in its principal components.
        distil: learn the dense model's predictions in place of the text.
        settle: share of the steps at the end in which adapters alone train.
        prior: order in which gates begin, "first-order" or "none".
        relax: of the gates.

    Raises:
        CorankError: a value out of range.
    """

    steps: int
    minutes: float | None = None
    rank: int = 8
    roles: tuple[str, ...] = ("q", "v")
    rate: float = 1e-4
    hidden: bool = True
    principal: bool = False
    distil: bool = False
    settle: float = 0.25
    prior: str = "first-order"
    relax: HardConcrete = HardConcrete.with_chance(0.01, sharpness=0.8)

    def __post_init__(self) -> None:
        if self.prior not in PRIORS:
            raise unknown("prior", self.prior, PRIORS)
        if self.steps < 2 or self.rank < 0 or not self.rate > 0 or not 0 <= self.settle < 1:
            raise CorankError("steps must be at least 2, rank not negative, rate positive, and settle below 1.")
        if self.minutes is not None and not self.minutes > 0:
            raise CorankError("minutes must be more than zero.")

    def __call__(self, task: Task, plan: Plan, work: Path | None) -> Learned:
        """Train and take out; the model is changed in place."""
        case = Case.of(task, plan, work)
        model = case.source.model
        cut = self.hidden and selectable(model) and not task.recipe.protect
        if self.hidden and not cut:
            why = "blocks are protected" if task.recipe.protect else f"that of {type(model).__name__} cannot be cut"
            case = case.saying(f"The residual stream keeps its size: {why}.")
        taught = predictions(case.source, case.data, batch=task.batch) if self.distil else None
        if self.principal and cut:
            case = in_principal_components(case)
        places = [f.place for f in case.fields] + ([hidden_place(model, case.source.outline)] if cut else [])
        dtype = torch.promote_types(case.source.dtype, torch.float32)
        gates = Gates(places, self.relax, dtype, case.source.device)
        look = max(round(LOOK * self.steps), 1) if self.prior != "none" else 0
        settle = round(self.settle * self.steps) if self.rank else 0
        learned = max(self.steps - look - settle, 1)

        def minutes(count: int) -> float | None:
            return None if self.minutes is None else self.minutes * count / self.steps

        if look:
            self.begin(case, gates, look, minutes(look))
        with adapters(model, case.matrices(self.roles), self.rank, task.seed) as lora:
            self._learn(case, gates, learned, minutes(learned), lora, taught)
            masks, hidden = choose(case, gates)
            if settle and lora.parameters:
                fixed = Gates(places, Plain(), dtype, case.source.device)
                with torch.no_grad():
                    for name, theta in fixed.theta.items():
                        theta.copy_(masks.values[name] if name != HIDDEN else hidden[1])  # type: ignore[index]
                rates = {"gate.": 0.0}
                case.train(
                    "settle",
                    fixed,
                    settle,
                    minutes(settle),
                    self.rate,
                    taught,
                    beside=lora.parameters,
                    rates=rates,
                )
        return take_out(case, masks, hidden)

    def begin(self, case: Case, gates: Gates, count: int, minutes: float | None) -> None:
        """Let the gates begin in the order of their first order per parameter, of the loss on text: a divergence has none."""
        plain = Gates(list(gates.places.values()), Plain(), next(iter(gates.theta.values())).dtype, case.source.device)
        watch = FirstOrder(plain)
        case.train("first-order", plain, count, minutes, self.rate, rates={"gate.": 0.0}, companions=[watch])
        width = len(gates.theta[HIDDEN]) if HIDDEN in gates.theta else 1
        cost = {**case.sizes.each, HIDDEN: case.sizes.dense / width}
        with torch.no_grad():
            for name, place in prior({n: s / cost[n] for n, s in watch.sums.items()}).items():
                gates.theta[name].copy_(NEAREST + (LIMIT - NEAREST) * place)

    def _learn(self, case: Case, gates: Gates, count: int, minutes: float | None, lora: Adapters, taught: Any) -> None:
        sizes, cut = case.sizes, HIDDEN in gates.places
        lagrangian = Lagrangian(1 - sizes.limit / sizes.dense, warm=max(count // 2, 1))
        beside: dict[str, nn.Parameter] = {**lagrangian.parameters(), **lora.parameters}
        rate = min(FAR / count, FASTEST)

        def penalty(step: int) -> Tensor:
            alive = gates.alive()
            share = alive[HIDDEN].double().mean() if cut else 1.0
            return lagrangian(1 - sizes.total(alive, share) / sizes.dense, step)

        case.train(
            "gates",
            gates,
            count,
            minutes,
            rate,
            taught,
            penalty=penalty,
            beside=beside,
            rates={"lagrangian": -2.0, "lora.": self.rate / rate},
            companions=[Clamp()],
        )


def in_principal_components(case: Case) -> Case:
    """Write the residual stream in its principal components, which changes nothing; a tied head gets a matrix of its own."""
    task, sizes, model = case.task, case.sizes, case.source.model
    head: Any = model.get_output_embeddings()
    with task.stage("measure"):
        second = residual_moment(task)
    if task.whole and head is not None and head.weight is model.get_input_embeddings().weight:  # type: ignore[union-attr]
        sizes = dataclasses.replace(sizes, outside=sizes.outside + head.weight.numel())
    rotate(model, task, torch.linalg.eigh(second)[1].flip(1))
    model.all_tied_weights_keys = {}
    return dataclasses.replace(case, sizes=sizes)


def choose(case: Case, gates: Gates) -> tuple[Masks, tuple[Tensor, Tensor] | None]:
    """What stays: within the budget, with one shift of all gates that makes the expected size that of the budget.

    Args:
        case: says what units cost.
        gates: trained; gates called `HIDDEN` are those of the residual stream.

    Returns:
        masks of the units; and (dimensions that stay, gates of all of them) of the residual stream, or None.
    """
    relax = dict(gates.relax)
    theta = {n: p.detach().double().cpu() for n, p in gates.theta.items()}
    sizes, cut = case.sizes, theta.pop(HIDDEN, None)
    parts = [f.part for f in case.fields]
    share, hidden = 1.0, None
    if cut is not None:
        t = shift(
            lambda t: float(sizes.total(_alive(relax, theta, t), relax[HIDDEN].alive(cut + t).mean())), sizes.limit
        )
        step, d = step_of(case.source.config), len(cut)
        width = min(max(round(float(relax[HIDDEN].alive(cut + t).sum()) / step) * step, step), d)
        while width > step and sizes.room(width / d) < size(parts, [p.down(0) for p in parts]):
            width -= step
        share = width / d
        kept = largest(cut, width)
        values = torch.zeros(d, dtype=torch.float64)
        values[kept] = relax[HIDDEN].value(cut + t)[kept].clamp_min(SOFTEST)
        hidden = (kept, values)
    room = sizes.room(share)
    t = shift(lambda t: float(sizes.total(_alive(relax, theta, t))), room + sizes.rest + sizes.outside)
    gone = [1 - float(a.mean()) for a in _alive(relax, theta, t).values()]
    if case.task.recipe.uniform:
        counts = _alike(parts, gone, room)
    else:
        counts = counts_of(parts, gone, room)
        counts = fill(parts, [theta[f.units.name] for f in case.fields], counts, room - size(parts, counts))
    found, values_of = {}, {}
    for each, count in zip(case.fields, counts, strict=True):
        name = each.units.name
        found[name] = largest(theta[name], count)
        values_of[name] = torch.zeros(each.units.count, dtype=torch.float64)
        values_of[name][found[name]] = relax[name].value(theta[name] + t)[found[name]].clamp_min(SOFTEST)
    return Masks(found, values_of), hidden


def _alive(relax: Mapping[str, Any], theta: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    return {n: relax[n].alive(p + t) for n, p in theta.items()}


def shift(size: Callable[[float], float], limit: float) -> float:
    """The largest t in [-60, 60], to 1e-9, with size(t) <= limit; size never falls. -60 if there is none."""
    low, high = -60.0, 60.0
    if size(high) <= limit:
        return high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low


def largest(theta: Tensor, count: int) -> Tensor:
    """The numbers of the `count` largest, ascending; of equal ones the first: int64 [count]."""
    return theta.argsort(descending=True, stable=True)[:count].sort().values


def fill(parts: Sequence[Part], thetas: Sequence[Tensor], counts: Sequence[int], spare: int) -> list[int]:
    """Let more units stay, those with the largest gates first, until no step of any part fits any more.

    Args:
        parts: with how many of each stay as yet, `counts`.
        thetas: gates of the units of each part [count]; the largest stay.
        spare: parameters that are left.
    """
    found, ranked = list(counts), [theta.sort(descending=True).values for theta in thetas]
    while True:
        able = [i for i, p in enumerate(parts) if found[i] < p.count and (p.up(found[i]) - found[i]) * p.cost <= spare]
        if not able:
            return found
        i = max(able, key=lambda i: float(ranked[i][found[i]]))
        wider = parts[i].up(found[i])
        spare, found[i] = spare - (wider - found[i]) * parts[i].cost, wider


def _alike(parts: list[Part], gone: list[float], room: int) -> list[int]:
    """One width of each kind for all blocks: the mean share of each kind goes."""
    kinds = list(dict.fromkeys(p.kind for p in parts))
    together, shares = [], []
    for kind in kinds:
        mine = [i for i, p in enumerate(parts) if p.kind == kind]
        first = parts[mine[0]]
        cost = sum(parts[i].cost for i in mine)
        together.append(Part(first.block, kind, first.count, cost, first.least, first.step))
        shares.append(sum(gone[i] for i in mine) / len(mine))
    counts = dict(zip(kinds, counts_of(together, shares, room), strict=True))
    return [counts[p.kind] for p in parts]
