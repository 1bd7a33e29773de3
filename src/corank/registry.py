"""The registry of methods, whatever family's recipe they return; and a run as YAML."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import yaml

from corank.errors import CorankError, unknown


class AnyRecipe(Protocol):
    """What the recipes of all families can be asked.

    Attributes:
        COMMON: fields that can be set on any method of the family, besides its own parameters.
        heal: how the result is trained afterwards, "none" for not at all.
    """

    COMMON: ClassVar[tuple[str, ...]]

    @property
    def heal(self) -> str: ...

    @property
    def sequential(self) -> bool:
        """Whether a layer is fitted to what the layers before it have become."""

    @property
    def looks(self) -> bool:
        """Whether something is judged on text that is held out from calibration."""

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration data."""

    @property
    def needs_budget(self) -> bool:
        """Whether it cannot do without being told a size."""

    def overridden(self, fields: Mapping[str, Any]) -> Self:
        """The same with some fields set."""


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name, family, cite: as registered.
        build: the function; its signature is the schema.
    """

    name: str
    family: str
    cite: str
    build: Callable[..., AnyRecipe]

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.build) or "").split("\n", 1)[0]

    @property
    def doc(self) -> str:
        """The docstring of the method and of its file."""
        module = inspect.getdoc(importlib.import_module(self.build.__module__)) or ""
        return f"{module}\n\n{inspect.getdoc(self.build) or ''}".strip()

    @property
    def parameters(self) -> dict[str, Any]:
        """Name -> default of the method's own parameters."""
        return {n: p.default for n, p in inspect.signature(self.build).parameters.items()}

    @property
    def kind(self) -> type[AnyRecipe]:
        """The class of its recipe."""
        return typing.get_type_hints(self.build).get("return") or type(self.build())

    @property
    def common(self) -> dict[str, Any]:
        """Name -> default of what can be set on any method of the family."""
        fields = {f.name: f.default for f in dataclasses.fields(self.kind)}  # type: ignore[arg-type]
        return {name: fields[name] for name in fields if name in self.kind.COMMON}

    def recipe(self, **settings: Any) -> Any:
        """The recipe with some parameters, or fields common to all methods of the family, set.

        Strings are converted to the type of the parameter.

        Raises:
            CorankError: an unknown name, or a value of the wrong type.
        """
        hints, common_hints = typing.get_type_hints(self.build), typing.get_type_hints(self.kind)
        own: dict[str, Any] = {}
        common: dict[str, Any] = {}
        for name, value in settings.items():
            if name in self.parameters:
                own[name] = _convert(name, value, hints.get(name, str))
            elif name in self.kind.COMMON:
                common[name] = _convert(name, value, common_hints[name])
            else:
                raise unknown(f"setting of {self.name!r}", name, [*self.parameters, *self.common])
        return self.build(**own).overridden(common)


LEFT_OPEN = {"multiple_of": 0}
"""Settings that may be `auto`, found when the model is known, and the value that says so until then."""


def _convert(name: str, value: Any, hint: Any) -> Any:
    if value == "auto" and name in LEFT_OPEN:
        return LEFT_OPEN[name]
    union = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in union):
        return None
    first = next(t for t in union if t is not type(None))
    wanted = typing.get_origin(first) or first
    try:
        if wanted is tuple:
            return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        if wanted is bool:
            table = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            return value if isinstance(value, bool) else table[str(value).lower()]
        if wanted is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return wanted(value) if wanted in (int, float, str) else value
    except (KeyError, ValueError, TypeError):
        raise CorankError(f"The setting {name}={value!r} should be of type {wanted.__name__}.") from None


_METHODS: dict[str, Method] = {}


Build = TypeVar("Build", bound=Callable[..., AnyRecipe])


def register(name: str, *, family: str, cite: str) -> Callable[[Build], Build]:
    """Register a function that returns a recipe as a method."""

    def decorate(build: Build) -> Build:
        if name in _METHODS and _METHODS[name].build.__module__ != build.__module__:
            raise ValueError(f"method {name!r} is registered twice")
        _METHODS[name] = Method(name, family, cite, build)
        return build

    return decorate


def _discover() -> None:
    package = importlib.import_module("corank.methods")
    for module in pkgutil.walk_packages(package.__path__, "corank.methods."):
        importlib.import_module(module.name)


def methods(pattern: str = "*", family: str | None = None) -> list[Method]:
    """Registered methods whose name matches a glob, e.g. ``methods("svd*")``, in alphabetical order."""
    _discover()
    found = [m for n, m in sorted(_METHODS.items()) if fnmatch.fnmatch(n, pattern)]
    return [m for m in found if family is None or m.family == family]


def get(name: str) -> Method:
    """The method of this name.

    Raises:
        CorankError: there is none; the nearest names are suggested.
    """
    _discover()
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    return _METHODS[name]


RUN_KEYS = (
    "method",
    "set",
    "keep",
    "remove",
    "params",
    "bytes",
    "max_perplexity_increase",
    "heldout",
    "latency",
    "latency_batch",
    "latency_tokens",
    "latency_device",
    "scope",
    "samples",
    "length",
    "seed",
    "data",
    "model",
)


def to_yaml(run: Mapping[str, Any]) -> str:
    """A run (method, its settings, budget, calibration) as YAML."""
    return yaml.safe_dump({k: _plain(v) for k, v in run.items() if v is not None}, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_yaml(path: str | Path) -> dict[str, Any]:
    """Read a run back from YAML.

    Raises:
        CorankError: the file is missing, is not a mapping, or has an unknown key.
    """
    file = Path(path)
    if not file.is_file():
        raise CorankError(f"There is no recipe file {file}.")
    try:
        run = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise CorankError(f"{file} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(run, dict):
        raise CorankError(f"{file} should be a mapping with keys such as method, set, keep.")
    for key in run:
        if key not in RUN_KEYS:
            raise unknown(f"key in {file}", str(key), RUN_KEYS)
    return run
