"""Between a model and the map of its factorized modules: read it off, build from it, undo it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from corank.errors import CorankError, unknown
from corank.factors import KINDS, DenseLinear, FactorizedLinear, as_stock, replace, shape_of, wire


def collect(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> spec of every module under `model` that the architecture alone does not describe.

    These are the factorized ones, and dense ones with a bias where the architecture has none.
    """
    return {
        name: layer.spec()
        for name, layer in model.named_modules()
        if isinstance(layer, FactorizedLinear) or (isinstance(layer, DenseLinear) and layer.added_bias)
    }


def factorized(model: nn.Module) -> dict[str, FactorizedLinear]:
    """Name -> module of every factorized module under `model`."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}


def resolve(model: nn.Module, name: str) -> str | None:
    """The name that a module of the checkpoint has in `model`, or None if `model` has no such module.

    A model saved with a head may be loaded without it and the other way round; the names then differ by the
    prefix of the base model.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def empty_layer(spec: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype) -> Any:
    """The layer a spec describes, with uninitialised values.

    Raises:
        CorankError: the kind is unknown.
    """
    kind = spec.get("kind", "")
    if kind not in KINDS:
        raise unknown("kind of factors", kind, KINDS)
    layer_class: Any = KINDS[kind][1]
    return layer_class.from_spec(spec, bias=bool(spec.get("bias")), device=device, dtype=dtype)


def build(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Replace the dense modules named in `modules` by empty ones of the kinds their specs name.

    The new modules have the device and dtype of those they replace, whose values are never read (they may be
    on the meta device). Modules that `model` does not have (a head that was not asked for) are left out.

    Args:
        model: freshly constructed, dense.
        modules: name -> spec.

    Raises:
        CorankError: a kind is unknown, or a spec does not fit the module it names.
    """
    for name, spec in modules.items():
        found = resolve(model, name)
        if found is None:
            continue
        old: Any = model.get_submodule(found)
        if list(shape_of(old)) != list(spec["shape"]):
            raise CorankError(
                f"{name}: the checkpoint holds a matrix {spec['shape']} and this model expects "
                f"{list(shape_of(old))}; config.json does not belong to these weights."
            )
        bias = spec.get("bias", old.bias is not None)
        layer = empty_layer({**spec, "bias": bias}, old.weight.device, old.weight.dtype)
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
