"""Adaptations: an adapter method as data; and the registry of adapter methods.

What `corank.recipe` is to compression this is to fine-tuning: a method is a registered function that returns an
`Adaptation`; its signature is its hyper-parameter schema. `corank.adapters.attach` carries it out.

    @adapter("curing", cite="arXiv:2501.04211")
    def curing(rank: int = 64) -> Adaptation: ...

PEFT is not imported here, so that listing methods stays quick.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from corank.errors import CorankError, unknown
from corank.registry import AnyRecipe, Method

FORMS = ("ends", "stack", "rotation", "lora")
GROUPINGS = ("shape", "role")


@dataclass(frozen=True)
class Adaptation:
    """What an adapter method does to a linear map W [m, n].

    Attributes:
        form: what is added to W, and what of it trains:
            "ends": C M R with columns C = W[:, J] and rows R = W[I]; M [r, r] trains, from zero.
            "stack": the same for a stack of matrices at once, with the product of tensors; M [S, r, r] trains, from zero.
            "rotation": a square matrix between parameter-free maps (MoRA); it trains, from zero.
            "lora": B A, taken out of W, so that the sum is W; both train. PEFT's own LoRA layer.
        rank: r.
        choose: the method's rule:
            "ends": (W, Measured or None, r, generator) -> (I, J), int64 [r] each;
            "stack": (list of W [m, n], r) -> (I, J);
            "lora": (W, Measured or None, r) -> (B [m, r], A [r, n]);
            "rotation": None.
        scale: factor before what is added; not of "lora".
        statistics: what is measured of the inputs if there is data (`corank.statistics.STATISTICS`).
        needs_data: whether there must be data.
        link: a factorized layer is adapted between its factors, instead of being refused.
        grouping: "stack": which matrices of one shape make a stack, all ("shape") or those of one role ("role").
    """

    COMMON: ClassVar[tuple[str, ...]] = ()

    form: str
    rank: int
    choose: Callable[..., Any] | None = None
    scale: float = 1.0
    statistics: tuple[str, ...] = ()
    needs_data: bool = False
    link: bool = False
    grouping: str = "shape"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form of adapters", self.form, FORMS)
        if self.grouping not in GROUPINGS:
            raise unknown("grouping", self.grouping, GROUPINGS)
        if self.rank < 1:
            raise CorankError(f"The rank of an adapter must be at least 1, got {self.rank}; at 0 nothing would train.")

    def overridden(self, fields: Mapping[str, Any]) -> Adaptation:
        """Itself: nothing but a method's own parameters can be set."""
        return self


_ADAPTERS: dict[str, Method] = {}
Build = TypeVar("Build", bound=Callable[..., Adaptation])


def adapter(name: str, *, cite: str) -> Callable[[Build], Build]:
    """Register a function that returns an `Adaptation` as a method of the family "adapters"."""

    def decorate(build: Build) -> Build:
        if name in _ADAPTERS and _ADAPTERS[name].build.__module__ != build.__module__:
            raise ValueError(f"adapter {name!r} is registered twice")
        _ADAPTERS[name] = Method(name, "adapters", cite, cast("Callable[..., AnyRecipe]", build))
        return build

    return decorate


def adapters() -> dict[str, Method]:
    """Name -> registered adapter method, in alphabetical order."""
    package = importlib.import_module("corank.methods.adapters")
    for module in pkgutil.iter_modules(package.__path__, "corank.methods.adapters."):
        importlib.import_module(module.name)
    return dict(sorted(_ADAPTERS.items()))


def adaptation(name: str, **settings: Any) -> Adaptation:
    """The adaptation of a method, with some of its parameters set.

    Raises:
        CorankError: no such method or parameter, or a value out of range.
    """
    known = adapters()
    if name not in known:
        raise unknown("adapter", name, known)
    return cast(Adaptation, known[name].recipe(**settings))
