"""Between a model and the map of its factorized modules: read it off, build from it, undo it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from corank.checkpoint.integers import reserve, specs_of
from corank.errors import CorankError, unknown
from corank.factors import (
    FORMS,
    KINDS,
    DenseLinear,
    ExpertList,
    FactorizedLinear,
    TiedEmbedding,
    as_stock,
    replace,
    shape_of,
    stacked,
    take_apart_for,
    wire,
    wire_tied,
)


def collect(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> spec of every module under `model` that the architecture alone does not describe.

    These are the factorized ones, and dense ones with a bias where the architecture has none.
    """
    return {
        name: describe(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, FactorizedLinear) or (isinstance(layer, DenseLinear) and layer.added_bias)
    }


def describe(layer: Any) -> dict[str, Any]:
    """The spec of a layer, with how its parts are stored where that is not in floating point."""
    quantized = specs_of(layer)
    return {**layer.spec(), "quantized": quantized} if quantized else layer.spec()


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
        CorankError: the kind or the form is unknown.
    """
    kind = spec.get("kind", "")
    if kind not in KINDS:
        raise unknown("kind of factors", kind, KINDS)
    form = spec.get("form")
    if form is not None and form not in FORMS:
        raise unknown("form of factors", form, FORMS)
    layer_class: Any = KINDS[kind][1] if form is None else FORMS[form]
    layer = layer_class.from_spec(spec, bias=bool(spec.get("bias")), device=device, dtype=dtype)
    reserve(layer, spec.get("quantized") or {})
    return layer


def build(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Replace the dense modules named in `modules` by empty ones of the kinds their specs name.

    The new modules have the device and dtype of those they replace, whose values are never read (they may be
    on the meta device). A head that was not asked for is left out.

    Args:
        model: freshly constructed, dense.
        modules: name -> spec.

    Raises:
        CorankError: a kind is unknown, a spec does not fit the module it names or names one that the model does not
            have, or the model's config ties a matrix that is stored as factors.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    take_apart_for(model, [n for name in modules for n in (name, name.removeprefix(prefix), prefix + name)])
    for name, spec in modules.items():
        found = resolve(model, name)
        if found is None:
            _refuse_unknown(model, name)
            continue
        _refuse_tied(model, found, spec)
        old: Any = model.get_submodule(found)
        if list(shape_of(old)) != list(spec["shape"]):
            raise CorankError(
                f"{name}: the checkpoint holds a matrix {spec['shape']} and this model expects "
                f"{list(shape_of(old))}; config.json does not belong to these weights."
            )
        bias = spec.get("bias", getattr(old, "bias", None) is not None)
        layer = empty_layer({**spec, "bias": bias}, old.weight.device, old.weight.dtype)
        if hasattr(layer, "basis"):
            layer.basis = resolve(model, layer.basis) or layer.basis
        if hasattr(layer, "owner"):
            layer.owner = resolve(model, layer.owner) or layer.owner
        replace(model, found, layer)
    wire(model)
    wire_tied(model)


def _refuse_unknown(model: nn.Module, name: str) -> None:
    """A checkpoint may have a head that this class does not; inside the blocks it must have what the model has."""
    config: Any = getattr(model, "config", None)
    same = type(model).__name__ in (getattr(config, "architectures", None) or [])
    prefix = getattr(model, "base_model_prefix", "")
    if same or (prefix and name.startswith(f"{prefix}.")):
        raise CorankError(
            f"config.json says that {name} is stored as factors, and {type(model).__name__} has no such module; "
            "config.json does not belong to this model."
        )


def _refuse_tied(model: nn.Module, name: str, spec: Mapping[str, Any]) -> None:
    """Tying would put the one end's matrix in the place of the other end's factors."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    if spec.get("form") != "tied" and f"{name}.weight" in {*ties, *ties.values()}:
        raise CorankError(
            f"config.json ties {name} to another matrix, but its factors are stored on their own; set "
            '"tie_word_embeddings": false there, as it was when the model was saved.'
        )


def restore_dense(model: nn.Module) -> None:
    """Multiply the factors out and put layers of the architecture's own class back, in place.

    Warns about sites whose bias the architecture does not store: a dense checkpoint loses it when loaded.

    Raises:
        CorankError: there are adapters on the factors, which would be lost.
    """
    if any(hasattr(part, "base_layer") for layer in factorized(model).values() for part in layer.children()):
        raise CorankError("The factors carry adapters; merge them first with `model = model.merge_and_unload()`.")
    layers = factorized(model)
    added = [name for name, layer in layers.items() if layer.added_bias]
    if added:
        warnings.warn(
            f"{len(added)} sites (first: {added[0]}) have a bias that this architecture does not store; "
            "a dense checkpoint saved from this model will lose it when loaded.",
            stacklevel=3,
        )
    tied = any(isinstance(layer, TiedEmbedding) for layer in layers.values())
    dense = {name: as_stock(layer, layer.transposed) for name, layer in layers.items()}  # some read others' factors
    for name, layer in dense.items():
        model.set_submodule(name, layer)
    for name, module in list(model.named_modules()):
        if isinstance(module, ExpertList):
            model.set_submodule(name, stacked(module))
    if tied:
        tie_again(model)


def tie_again(model: Any) -> None:
    """Make one matrix of the embedding and the head of a model that was untied because both read the same factors."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    model.tie_weights()
