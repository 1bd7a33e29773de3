"""Standing in for a method of one module without touching its parameters, its name or its hooks.

A callable object is put under the name of the method into the module's `__dict__`, where Python finds it before the
method of the class. The tree of modules and the state dict stay what they were, hooks on the module still run, a deep
copy of the model gets its own copy of the object, and taking the object away restores the model exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

LOG = logging.getLogger("corank.runtime")


class Override:
    """What stands in for `type(module).<attribute>` on one module.

    A call with exactly `arity` positional arguments goes to `compute`, any other to the method of the class.

    Args:
        module: the module it belongs to.
        attribute: name of the method.
    """

    arity: ClassVar[int] = 1

    def __init__(self, module: nn.Module, attribute: str = "forward"):
        self.module = module
        self.attribute = attribute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != self.arity:
            return self.original(*args, **kwargs)
        return self.compute(*args)

    def compute(self, *args: Any) -> Any:
        """What stands in for the method."""
        raise NotImplementedError

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the method of the class returns."""
        return getattr(type(self.module), self.attribute)(self.module, *args, **kwargs)

    def release(self) -> None:
        """Give back what was taken from the module; called when it is restored."""


def install(override: Override) -> bool:
    """Put an override in place. A module whose method somebody else has replaced is left alone.

    Returns:
        whether it was put in place.
    """
    if override.attribute in vars(override.module):
        note(f"{type(override.module).__name__}.{override.attribute} is replaced already; it is left as it is")
        return False
    setattr(override.module, override.attribute, override)
    return True


def overrides(model: nn.Module) -> Iterator[Override]:
    """All overrides in a model."""
    for module in model.modules():
        yield from [value for value in vars(module).values() if isinstance(value, Override) and value.module is module]


def uninstall(model: nn.Module) -> None:
    """Restore every module of a model."""
    for override in list(overrides(model)):
        delattr(override.module, override.attribute)
        override.release()


_noted: set[str] = set()


def note(sentence: str) -> None:
    """Log a sentence at level DEBUG, once per process: a fallback is normal, and a model has many layers."""
    if sentence not in _noted:
        _noted.add(sentence)
        LOG.debug(sentence)


def inference(*modules: nn.Module) -> bool:
    """Whether nothing is being learned, compiled, exported or cast automatically, so that a detour is legal.

    A compiler wants the plain modules: it cannot see whether a tensor still lies where it did.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cuda")
        or torch.is_autocast_enabled("cpu")
        or any(module.training for module in modules)
    )
