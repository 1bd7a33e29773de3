"""Pruning while tuning: units go a few at a time, by an importance that is averaged over the steps (LoRAPrune, arXiv:2305.18403).

    I <- 0.9 I + 0.1 s;   every few steps the share 1 - v(t) of each hidden vector with the lowest I is masked, for good;
    v(t) = v + (1 - v) (1 - (t - t_0) / T')^3 between a warm-up and a cool-down

The importance s of a unit is, from "gates", |dloss / dg_u| of a gate g_u = 1 that multiplies it: exactly what taking it out
changes to first order, a sum over tokens that any backward pass has at hand. From "lora" it is the paper's, a product of
gradients of adapters that stands for it (`corank.structured.lora_gradient`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corank.errors import CorankError, unknown
from corank.factors import weight_of
from corank.gates import Gates, Plain
from corank.structured.learning import Adapters, Case, Field, Learned, Masks, adapters, take_out
from corank.structured.lora_gradient import unit_importance, weight_importance
from corank.structured.plan import Plan
from corank.structured.task import Task
from corank.structured.units import CHANNELS
from corank.training.movement import share_kept

IMPORTANCES = ("gates", "lora")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
DECAY = 0.9
"""Share of the old importance in the new one."""
BEGIN = SETTLE = 0.1
"""Shares of the steps before the first unit goes, and after the last one has gone."""

Importance = Callable[[Field, Mapping[str, Tensor]], Tensor]
"""From a hidden vector, and what trains with its gradients, to the importance of its units now: [count]."""


def by_gates(field: Field, values: Mapping[str, Tensor]) -> Tensor:
    """|dloss / dg|, divided by its norm."""
    gradient = values[f"gate.{field.units.name}"].grad
    if gradient is None:
        return torch.zeros(field.units.count, dtype=torch.float64)
    found = gradient.detach().double().abs().cpu()
    norm = float(found.norm())
    return found / norm if norm > 0 else found


def by_lora(case: Case, lora: Adapters) -> Importance:
    """The paper's importance, from the gradients of adapters.

    Args:
        case: the model; its matrices have adapters.
        lora: these.
    """
    outline, model = case.source.outline, case.source.model

    def importance(field: Field, values: Mapping[str, Tensor]) -> Tensor:
        prefix = f"{outline.path(case.plan.kept[field.part.block])}."
        found: dict[str, Tensor] = {}
        for path in {*(prefix + r.path for r in field.units.producers), field.units.name}:
            A, B = (values.get(f"lora.{path}.{part}") for part in "AB")
            if A is not None and B is not None and A.grad is not None and B.grad is not None:
                layer: Any = model.get_submodule(path)
                W = weight_of(layer.base_layer).to(A.dtype)
                found[path] = weight_importance(W, A.detach(), B.detach(), A.grad, B.grad, lora.scale)
        return unit_importance(field.units, prefix, found)

    return importance


class GradualMasks:
    """Masks that close unit by unit; a companion of the training of plain gates that do not move by themselves.

    Args:
        case: whose plan says how many units stay.
        steps: of the training.
        importance: of units.
        every: steps between two changes of the masks.

    Attributes:
        averaged: name -> I, float64 [count].
        masks: name -> bool [count]; what is False stays so.
    """

    def __init__(self, case: Case, steps: int, importance: Importance, every: int = 1):
        self.case, self.steps, self.importance, self.every = case, steps, importance, every
        self.averaged = {f.units.name: torch.zeros(f.units.count, dtype=torch.float64) for f in case.fields}
        self.masks = {name: torch.ones(len(each), dtype=torch.bool) for name, each in self.averaged.items()}

    def before(self, step: int) -> None:
        """Nothing."""

    def after(self, step: int, values: Mapping[str, Tensor]) -> bool:
        """Average the importance; if it is time, close units. Steps whose gradients are not finite do not count."""
        for each in self.case.fields:
            name = each.units.name
            now = self.importance(each, values)
            if bool(torch.isfinite(now).all()):
                self.averaged[name] = DECAY * self.averaged[name] + (1 - DECAY) * now
        done = step + 1
        if done % self.every == 0 or done >= (1 - SETTLE) * self.steps:
            self.close(done)
        with torch.no_grad():
            for name, mask in self.masks.items():
                theta = values[f"gate.{name}"]
                theta.copy_(mask.to(theta))
        return False

    def close(self, done: int) -> None:
        """Mask what the schedule asks for after so many steps."""
        for each in self.case.fields:
            name, count = each.units.name, each.units.count
            final = wanted(self.case, each)
            stay = max(round(count * share_kept(done, self.steps, final / count, BEGIN, SETTLE)), final)
            mask = self.masks[name]
            if stay < int(mask.sum()):
                rank = self.averaged[name].masked_fill(~mask, -torch.inf)
                kept = rank.argsort(descending=True, stable=True)[:stay]
                self.masks[name] = torch.zeros_like(mask).index_fill(0, kept, True)

    def state(self) -> dict[str, Any]:
        """Importance and masks."""
        return {"averaged": dict(self.averaged), "masks": dict(self.masks)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.averaged = {name: value.clone() for name, value in state["averaged"].items()}
        self.masks = {name: value.clone() for name, value in state["masks"].items()}


def wanted(case: Case, field: Field) -> int:
    """Units of a hidden vector that the plan keeps."""
    width = case.plan.widths[field.part.block]
    return width.channels if field.part.kind == CHANNELS else width.kv_heads


@dataclass(frozen=True)
class Gradual:
    """Prune while tuning adapters; see `corank.structured.recipe.Structured.learn`.

    Attributes:
        steps: of training.
        minutes: its end by the clock, None for none; what has not gone by then goes at once.
        rank: of the adapters on all matrices.
        alpha: their product counts alpha / rank.
        rate: learning rate.
        importance: "gates" or "lora".

    Raises:
        CorankError: a value out of range.
    """

    steps: int
    minutes: float | None = None
    rank: int = 8
    alpha: float = 16.0
    rate: float = 1e-4
    importance: str = "gates"

    def __post_init__(self) -> None:
        if self.importance not in IMPORTANCES:
            raise unknown("importance", self.importance, IMPORTANCES)
        if self.steps < 2 or self.rank < 1 or not self.rate > 0:
            raise CorankError("steps must be at least 2, rank at least 1, and rate positive.")
        if self.minutes is not None and not self.minutes > 0:
            raise CorankError("minutes must be more than zero.")

    def __call__(self, task: Task, plan: Plan, work: Path | None) -> Learned:
        """Train and take out; the model is changed in place."""
        case = Case.of(task, plan, work)
        dtype = torch.promote_types(case.source.dtype, torch.float32)
        gates = Gates([f.place for f in case.fields], Plain(), dtype, case.source.device)
        with adapters(case.source.model, case.matrices(ROLES), self.rank, task.seed, self.alpha) as lora:
            importance = by_gates if self.importance == "gates" else by_lora(case, lora)
            masks = GradualMasks(case, self.steps, importance, every=max(1, min(10, self.steps // 10)))
            case.train(
                "gates",
                gates,
                self.steps,
                self.minutes,
                self.rate,
                beside=lora.parameters,
                rates={"gate.": 0.0},
                companions=[masks],
                constant=False,
            )
            masks.close(self.steps)  # what a training that the clock has ended has left
        kept = {name: mask.nonzero().flatten() for name, mask in masks.masks.items()}
        return take_out(case, Masks.hard(kept, {f.units.name: f.units.count for f in case.fields}))
