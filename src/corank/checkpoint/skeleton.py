"""Between a model and the map of its factorized modules: read it off, build empty modules from it, undo it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from corank.errors import CorankError, unknown
from corank.factors import KINDS, FactorizedLinear, as_stock, replace, shape_of, wire


def collect(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> spec of every factorized module under `model`."""
    return {name: layer.spec() for name, layer in factorized(model).items()}


def factorized(model: nn.Module) -> dict[str, FactorizedLinear]:
    """Name -> module of every factorized module under `model`."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}


def resolve(model: nn.Module, name: str) -> str | None:
    """The name that a module of the checkpoint has in `model`, or None if `model` has no such module.

    A model saved with a head may be loaded without it and the other way round; the names then differ by the prefix
    of the base model.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def build(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Replace the dense modules named in `modules` by empty ones of the kinds their specs name.

    The new modules have the device and dtype of those they replace, whose values are never read (they may be on the
    meta device). Modules that `model` does not have (a head that was not asked for) are left out.

    Args:
        model: freshly constructed, dense.
        modules: name -> spec.

    Raises:
        CorankError: a kind is unknown, or a spec does not fit the module it names.
    """
    for name, spec in modules.items():
        kind, found = spec.get("kind", ""), resolve(model, name)
        if kind not in KINDS:
            raise unknown("kind of factors", kind, KINDS)
        if found is None:
            continue
        old: Any = model.get_submodule(found)
        if list(shape_of(old)) != list(spec["shape"]):
            raise CorankError(
                f"{name}: the checkpoint holds a matrix {spec['shape']}, this model expects {list(shape_of(old))}; "
                "config.json does not belong to these weights."
            )
        bias = spec.get("bias", old.bias is not None)
        layer = KINDS[kind][1].from_spec(spec, bias=bias, device=old.weight.device, dtype=old.weight.dtype)
        if hasattr(layer, "basis"):
            layer.basis = resolve(model, layer.basis) or layer.basis
        replace(model, found, layer)
    wire(model)


def restore_dense(model: nn.Module) -> None:
    """Multiply the factors out and put layers of the architecture's own class back, in place.

    Warns about sites whose bias the architecture does not store: a dense checkpoint loses it when loaded.
    """
    layers = factorized(model)
    added = [name for name, layer in layers.items() if layer.added_bias]
    if added:
        warnings.warn(
            f"{len(added)} sites (first: {added[0]}) have a bias that this architecture does not store; "
            "a dense checkpoint saved from this model will lose it when loaded.",
            stacklevel=3,
        )
    for name, layer in layers.items():
        model.set_submodule(name, as_stock(layer, layer.transposed))
