"""What a gate is in the forward pass, and how its parameter is differentiated through it.

straight through   z = 1[m > 0], dz/dm as of relu(m)                          (ACIP, arXiv:2502.01717)
hard concrete      z = clamp(sigmoid((logit(u) + a) / beta) (h - l) + l, 0, 1), u ~ U(0, 1)
                   P(z > 0) = sigmoid(a - beta ln(-l / h))                    (Louizos et al., arXiv:1712.01312)
plain              z = m: what the gradient of a gate is asked with, or a mask that somebody else sets
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Relaxation(Protocol):
    """From the parameters of n gates to their values. All functions are of one vector [n] and differentiable."""

    def initial(self, count: int) -> Tensor:
        """Parameters to start from [count], at which every gate is as good as open."""
        ...

    def draw(self, theta: Tensor, uniform: Tensor) -> Tensor:
        """Values in training [n], from numbers drawn uniformly from (0, 1) [n]; they need not depend on these."""
        ...

    def value(self, theta: Tensor) -> Tensor:
        """Values without chance, for judging [n]."""
        ...

    def alive(self, theta: Tensor) -> Tensor:
        """The chance that a gate is not 0 [n]; with a gradient, so that a sum of it can be a penalty."""
        ...

    def score(self, theta: Tensor) -> Tensor:
        """What gates that are open are ranked by [n]: positive for these, the higher the longer they stay."""
        ...


def straight_through(theta: Tensor) -> Tensor:
    """1 where theta > 0, else 0; the gradient is that of relu(theta)."""
    soft = torch.relu(theta)
    return (theta > 0).to(theta.dtype) + (soft - soft.detach())


@dataclass(frozen=True)
class StraightThrough:
    """A gate is open as long as its parameter is positive; once it is not, nothing moves it any more.

    Attributes:
        start: the parameter of a gate before training, > 0.
    """

    start: float = 1.0

    def initial(self, count: int) -> Tensor:
        """All at `start`."""
        return torch.full((count,), self.start)

    def draw(self, theta: Tensor, uniform: Tensor) -> Tensor:
        """Nothing is drawn."""
        return straight_through(theta)

    def value(self, theta: Tensor) -> Tensor:
        """0 or 1."""
        return straight_through(theta)

    def alive(self, theta: Tensor) -> Tensor:
        """The value itself, which is differentiated as relu."""
        return straight_through(theta)

    def score(self, theta: Tensor) -> Tensor:
        """The parameter."""
        return theta


@dataclass(frozen=True)
class HardConcrete:
    """A random gate with mass at 0 and at 1.

    Attributes:
        start: log_alpha before training; 10 is open for certain.
        beta: temperature.
        low, high: limits of the interval that is clamped to [0, 1].
        sharpness: `value` is the median gate at log_alpha times this (0.8 in Compresso's code); 1: its own.
    """

    start: float = 10.0
    beta: float = 2 / 3
    low: float = -0.1
    high: float = 1.1
    sharpness: float = 1.0

    @classmethod
    def with_chance(cls, closed: float, **rest: float) -> HardConcrete:
        """The one that begins with log_alpha = ln((1 - p) / p), p = `closed`."""
        return cls(start=math.log((1 - closed) / closed), **rest)

    def initial(self, count: int) -> Tensor:
        """All at `start`."""
        return torch.full((count,), self.start)

    def draw(self, theta: Tensor, uniform: Tensor) -> Tensor:
        """z in [0, 1]."""
        u = uniform.clamp(1e-6, 1 - 1e-6)
        return self._stretched(torch.sigmoid((torch.logit(u) + theta) / self.beta))

    def value(self, theta: Tensor) -> Tensor:
        """The median gate (u = 1/2)."""
        return self._stretched(torch.sigmoid(theta * self.sharpness / self.beta))

    def alive(self, theta: Tensor) -> Tensor:
        """P(z > 0) in closed form."""
        return torch.sigmoid(theta - self.beta * math.log(-self.low / self.high))

    def score(self, theta: Tensor) -> Tensor:
        """P(z > 0)."""
        return self.alive(theta)

    def _stretched(self, s: Tensor) -> Tensor:
        return (s * (self.high - self.low) + self.low).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Plain:
    """The parameter itself: 1 before training."""

    def initial(self, count: int) -> Tensor:
        """Ones."""
        return torch.ones(count)

    def draw(self, theta: Tensor, uniform: Tensor) -> Tensor:
        """theta."""
        return theta

    def value(self, theta: Tensor) -> Tensor:
        """theta."""
        return theta

    def alive(self, theta: Tensor) -> Tensor:
        """1 where theta is not 0, differentiated as |theta|."""
        soft = theta.abs()
        return (theta != 0).to(theta.dtype) + (soft - soft.detach())

    def score(self, theta: Tensor) -> Tensor:
        """|theta|."""
        return theta.abs()
