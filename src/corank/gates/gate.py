"""Gates on hidden vectors of a model, put there by hooks and taken off without trace.

A place says which hidden vector is multiplied: channels at the input of a down projection, heads at the input of an output
projection, dimensions of what blocks hand on, or the directions between two factors of a matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from corank.errors import CorankError
from corank.factors import LowRank
from corank.gates.relax import Relaxation

SIDES = ("input", "output")


class Place(Protocol):
    """Where n gates are.

    Attributes:
        name: of the gates, unique in a model.
    """

    @property
    def name(self) -> str: ...

    @property
    def count(self) -> int:
        """Gates, n."""
        ...

    @property
    def dense(self) -> int:
        """Parameters that depend on the gates as long as all of them are open."""
        ...

    def cost(self, kept: int) -> int:
        """Parameters stored for so many open gates; never above `dense`, never falling."""
        ...

    def attach(self, model: nn.Module, values: Callable[[], Tensor]) -> Callable[[], None]:
        """Multiply by ``values()`` [n] in every forward pass from now on; what it returns undoes that."""
        ...


@dataclass(frozen=True)
class Point:
    """The input or the output of a module.

    Attributes:
        module: its path in the model.
        side: "input" (its first argument) or "output".
    """

    module: str
    side: str = "input"

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise CorankError(f"side={self.side!r} should be input or output.")


@dataclass(frozen=True)
class Vector:
    """A hidden vector [..., count * size] whose neighbours of `size` values share one gate.

    Attributes:
        name: of the gates.
        points: where the vector is seen; at all of them it is multiplied by the same gates. A vector between producers and one
            consumer needs one point, the input of the consumer.
        count: gates.
        size: values to a gate: 1 for a channel, g h for a key-value head that g query heads of h dimensions read.
        each: parameters that go with a gate; 0 where they are counted elsewhere.
    """

    name: str
    points: tuple[Point, ...]
    count: int
    size: int = 1
    each: int = 0

    @property
    def dense(self) -> int:
        """Parameters of all units."""
        return self.count * self.each

    def cost(self, kept: int) -> int:
        """Parameters of so many units."""
        return kept * self.each

    def attach(self, model: nn.Module, values: Callable[[], Tensor]) -> Callable[[], None]:
        """See `Place`."""

        def gated(x: Tensor) -> Tensor:
            if x.shape[-1] != self.count * self.size:
                raise CorankError(
                    f"The gates {self.name} are for vectors of {self.count * self.size} values, and here are {x.shape[-1]}."
                )
            z = values().to(x.device, x.dtype)
            return x * (z if self.size == 1 else z.repeat_interleave(self.size))

        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return gated(args[0]), *args[1:]

        def after(_module: nn.Module, _args: Any, out: Any) -> Any:
            return (gated(out[0]), *out[1:]) if isinstance(out, tuple) else gated(out)

        handles = []
        for point in self.points:
            module = model.get_submodule(point.module)
            handles.append(
                module.register_forward_pre_hook(before)
                if point.side == "input"
                else module.register_forward_hook(after)
            )

        def off() -> None:
            for handle in handles:
                handle.remove()

        return off


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank update of the factor that reads the input: A + scale D C.

    Attributes:
        C: [r, n].
        D: [p, r], zero before training.
        scale: s.
    """

    C: nn.Parameter
    D: nn.Parameter
    scale: float = 1.0

    def update(self) -> Tensor:
        """s D C [p, n], detached."""
        return (self.scale * (self.D @ self.C)).detach()


@dataclass(frozen=True, eq=False)
class Directions:
    """The p directions of a linear layer W = up down: y = up (z * (down x)) + bias.

    The layer's own weight is not read while they are attached. Not for layers that PEFT has wrapped; updates belong into
    `adapter`, which is gated with the direction that it updates, so that it costs nothing at any size.

    Attributes:
        name: of the gates and of the matrix.
        module: path of the layer, an `nn.Linear` or a `Conv1D`.
        up: [m, p].
        down: [p, n].
        adapter: trains beside the gates, None for none.
        count_values: stored values of an m x n matrix at a rank; that of two plain factors by default.
    """

    name: str
    module: str
    up: Tensor
    down: Tensor
    adapter: Adapter | None = None
    count_values: Callable[[int, int, int], int] = field(default=LowRank.count)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def count(self) -> int:
        """Directions, p."""
        return self.up.shape[1]

    @property
    def dense(self) -> int:
        """m n: with all directions the matrix is stored as it is."""
        m, n = self.shape
        return m * n

    def cost(self, kept: int) -> int:
        """Stored values: of factors, or of the matrix where factors would not be smaller."""
        return min(self.count_values(*self.shape, kept), self.dense)

    def attach(self, model: nn.Module, values: Callable[[], Tensor]) -> Callable[[], None]:
        """See `Place`."""
        layer: Any = model.get_submodule(self.module)
        up, down, adapter = self.up, self.down, self.adapter

        def forward(x: Tensor) -> Tensor:
            hidden = functional.linear(x, down.to(x.dtype))
            if adapter is not None:
                low = functional.linear(x, adapter.C.to(x.dtype))
                hidden = hidden + adapter.scale * functional.linear(low, adapter.D.to(x.dtype))
            return functional.linear(hidden * values().to(x.device, x.dtype), up.to(x.dtype), layer.bias)

        layer.forward = forward

        def off() -> None:
            layer.__dict__.pop("forward", None)

        return off


class Gates:
    """Several gate vectors with their parameters.

    Args:
        places: where they are; their names differ.
        relax: of all of them, or name -> relaxation.
        dtype: of the parameters.
        device: of the parameters.

    Attributes:
        places: by name.
        theta: name -> parameters [n].
        noise: name -> numbers in (0, 1) [n] for the coming passes, see `draw`; None: values without chance.

    Raises:
        CorankError: a name comes twice.
    """

    def __init__(
        self,
        places: Sequence[Place],
        relax: Relaxation | Mapping[str, Relaxation],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.places: dict[str, Any] = {place.name: place for place in places}
        if len(self.places) < len(places):
            raise CorankError("Two gate vectors have the same name.")
        self.relax: dict[str, Relaxation] = (
            dict(relax) if isinstance(relax, Mapping) else dict.fromkeys(self.places, relax)
        )
        self.theta = {
            name: nn.Parameter(self.relax[name].initial(place.count).to(device, dtype))
            for name, place in self.places.items()
        }
        self.noise: dict[str, Tensor] | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, as `corank.gates.train` names it: "gate.NAME" -> theta."""
        return {f"gate.{name}": p for name, p in self.theta.items()}

    def draw(self, seed: int, step: int) -> None:
        """Draw the noise of a step: it depends on these two numbers alone."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**62)
        self.noise = {n: torch.rand(len(p), generator=generator).to(p) for n, p in self.theta.items()}

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Values without chance inside."""
        noise, self.noise = self.noise, None
        try:
            yield
        finally:
            self.noise = noise

    def value(self, name: str) -> Tensor:
        """Values of a gate vector in the coming pass [n], differentiable."""
        theta, relax = self.theta[name], self.relax[name]
        return relax.value(theta) if self.noise is None else relax.draw(theta, self.noise[name])

    def alive(self) -> dict[str, Tensor]:
        """Chance of every gate to be open, name -> [n], differentiable."""
        return {n: self.relax[n].alive(p) for n, p in self.theta.items()}

    def open(self) -> dict[str, Tensor]:
        """Whether every gate is open without chance, name -> bool [n]."""
        with torch.no_grad():
            return {n: self.relax[n].value(p) > 0 for n, p in self.theta.items()}

    @property
    def dense(self) -> int:
        """Parameters of all places with every gate open."""
        return sum(place.dense for place in self.places.values())

    def size(self) -> int:
        """Parameters of all places with the gates that are open now; exact, not differentiable."""
        return sum(self.places[n].cost(int(is_open.sum())) for n, is_open in self.open().items())

    def ratio(self) -> float:
        """The same relative to all gates open."""
        return self.size() / max(self.dense, 1)

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Gates multiply in every forward pass of the model inside; afterwards it is as it was, to the bit.

        Args:
            model: paths of the places are those of its modules.
        """
        undo: list[Callable[[], None]] = []
        try:
            for name, place in self.places.items():
                undo.append(place.attach(model, lambda name=name: self.value(name)))
            yield
        finally:
            for off in reversed(undo):
                off()
