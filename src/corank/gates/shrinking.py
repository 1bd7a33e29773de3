"""A penalty that makes gates close one after the other, in pace with the steps there are (ACIP, arXiv:2502.01717)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from corank.gates.gate import Gates

PACE = 1.25
"""Factor by which the weight of the penalty changes in a step, up if the model is too large for the step, else down."""
LEAST = 1.0
"""Least weight, in units of what the slopes of the loss are. A slope says little of what a gate is worth: half of all are
positive, and below this the optimizer, which looks at signs, would close these whatever they carry."""
WEIGHT = 1e-4
"""Of the penalty at the beginning: nats per gate of mean cost."""
REACH = 1.5
"""A gate can move this far, in units of what the gates begin with, in the course of a training."""


def rate(steps: int) -> float:
    """The learning rate at which a gate that nothing holds has closed after two thirds of so many steps."""
    return REACH / max(steps, 1)


class Shrinking:
    """weight * sum over gates of cost * relu(m), and a companion of `corank.gates.train` that sets its weight.

    The paper's weight grows by a fixed factor, over many thousands of steps. Here what is open, weighed by cost, is to fall
    in a straight line within the steps, and the weight follows it. Not the stored size: that of a matrix does not fall
    before it has lost about half of its components, and the weight would drown the loss until then.

    Args:
        gates: straight-through ones.
        to: share of the parameters, as they would be stored, at which training ends.
        steps: in all.

    Attributes:
        weight: of the penalty.
    """

    def __init__(self, gates: Gates, to: float, steps: int):
        self.gates, self.to, self.steps = gates, to, steps
        self.weight = WEIGHT
        each = {name: place.cost(1) - place.cost(0) for name, place in gates.places.items()}
        self._whole = max(sum(each[n] * place.count for n, place in gates.places.items()), 1)
        mean = self._whole / max(sum(place.count for place in gates.places.values()), 1)
        self._each, self._weights = each, {name: cost / mean for name, cost in each.items()}
        self._end = min(to * gates.dense / self._whole, 1.0)

    def __call__(self, step: int) -> Tensor:
        """The penalty, a scalar."""
        parts = [self._weights[name] * torch.relu(p).sum() for name, p in self.gates.theta.items()]
        return self.weight * torch.stack(parts).sum()

    def before(self, step: int) -> None:
        """Nothing."""

    def after(self, step: int, values: Mapping[str, Tensor]) -> bool:
        """Set the weight for the next step; True once the size is reached."""
        places = self.gates.places
        left = {name: int((values[f"gate.{name}"] > 0).sum()) for name in places}
        share = sum(self._each[name] * count for name, count in left.items()) / self._whole
        planned = 1 - (1 - self._end) * (step + 1) / self.steps
        least = LEAST * self._slope(values)
        self.weight = max(self.weight * (PACE if share > planned else 1 / PACE), least)
        return sum(places[name].cost(count) for name, count in left.items()) <= self.to * self.gates.dense

    def _slope(self, values: Mapping[str, Tensor]) -> float:
        """Root mean square of the slope of the loss alone over the gates that are open, per cost."""
        found = []
        for name, each in self._weights.items():
            theta = values[f"gate.{name}"]
            if theta.grad is not None and each > 0:
                slope = (theta.grad / each - self.weight)[theta.grad != 0]  # of closed gates there is none
                found.append(slope.detach().double().cpu())
        every = torch.cat(found) if found else torch.zeros(0)
        return float(every.square().mean().sqrt()) if len(every) else 0.0

    def state(self) -> dict[str, Any]:
        """The weight."""
        return {"weight": self.weight}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.weight = float(state["weight"])
