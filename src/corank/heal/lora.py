"""LoRA (arXiv:2106.09685) on compressed models through PEFT: on the factors, or beside their product."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from corank.errors import CorankError, unknown
from corank.factors import FactorizedLinear, SharedLowRankLinear, is_conv1d, shape_of
from corank.heal.growth import grown, grown_together, put_in_place, refuse_quantized
from corank.model import Site, select_sites
from corank.model.archs import role_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

PLACES = ("factors", "product")


def lora_config(
    model: nn.Module,
    r: int = 8,
    on: str = "factors",
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
    **settings: Any,
) -> LoraConfig:
    """A PEFT configuration that adapts every linear layer of a compressed model but its output head.

    Dense layers get ordinary LoRA. A factorized layer W' = B A gets adapters

    - on "factors": one on each factor that trains (of a CUR only the link: its rows and columns are those of W).
      Merged by PEFT's `merge_and_unload` into the factors: same kind, same rank, no cost afterwards.
    - on "product": one beside the layer, W' + s D C: the update LoRA would make to the dense layer. Merged by
      `merge_lora` or `merge_and_unload`, exactly, into factors of larger rank. PEFT does not write down that it
      needs this layer: load such adapters with `load_lora`.

    Args:
        model: the model, before `get_peft_model`.
        r: rank of the adapters.
        on: "factors" or "product".
        alpha: the scale s is alpha / r; None: 2 r.
        dropout: of the adapters' input.
        targets, ignore: roles (q, k, v, o, gate, up, down, ...), globs or ``re:`` patterns of the layers to adapt and
            to leave alone; None: all, none.
        settings: other fields of `peft.LoraConfig`, such as ``task_type="CAUSAL_LM"``.

    Returns:
        For `peft.get_peft_model(model, config)` or `model.add_adapter(config)`.

    Raises:
        CorankError: peft is not installed, an unknown place or pattern, a rank below one. `get_peft_model` raises it
            for initialisations and variants (DoRA and others) that need the weight itself, which a product has not.
    """
    peft = require_peft()
    if on not in PLACES:
        raise unknown("place for adapters", on, PLACES)
    if r < 1:
        raise CorankError(f"The rank of the adapters must be at least 1, got {r}.")
    if hasattr(model, "peft_config"):
        raise CorankError("The model has adapters already; make the configuration before adding the first of them.")
    names = [name for layer in _chosen(model, targets, ignore) for name in _places(model, layer, on)]
    config = peft.LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=names,
        **settings,
    )
    return _registered(config)


def load_lora(
    model: nn.Module, directory: str | os.PathLike[str], *, trainable: bool = False, name: str = "default"
) -> PeftModel:
    """Put adapters saved by `PeftModel.save_pretrained` on the compressed model they were trained on.

    Adapters on factors can as well be loaded by PEFT alone, those on products only by this function.

    Args:
        model: as it was when `lora_config` was called.
        directory: with adapter_config.json and the adapter's weights.
        trainable: go on training them.
        name: of the adapter.

    Raises:
        CorankError: peft is not installed, there is no LoRA adapter in the directory, or it does not fit the model.
    """
    peft = require_peft()
    if not (Path(directory) / "adapter_config.json").is_file():
        raise CorankError(f"{directory} holds no adapter: it has no adapter_config.json.")
    config = peft.PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, peft.LoraConfig):
        raise CorankError(f"{directory} holds a {config.peft_type} adapter, not LoRA; load it with PEFT.")
    try:
        return peft.PeftModel.from_pretrained(
            model, str(directory), adapter_name=name, is_trainable=trainable, config=_registered(config)
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CorankError(f"The adapter in {directory} does not fit this model: {reason}") from error


def merge_lora(model: PeftModel, keep_rank: bool = False) -> Any:
    """Merge all active adapters and take them off.

    What `merge_and_unload` does, and more: layers that share a basis are merged together, and the rank can be kept.
    A layer whose factors would not be smaller than its matrix becomes dense.

    Args:
        model: as `get_peft_model` or `load_lora` give it.
        keep_rank: truncate W' + s D C to the rank of W', the nearest matrix of that rank in the Frobenius norm, instead
            of letting the rank grow by that of the adapter. (Adapters on factors keep it in any case.)

    Returns:
        The model without adapters.

    Raises:
        CorankError: it has no adapters, or its factors are quantized.
    """
    peft = require_peft()
    if not isinstance(model, peft.PeftModel):
        raise CorankError("This model has no adapters to merge; give what peft.get_peft_model returned.")
    base = model.get_base_model()
    for layer in base.modules():  # all of them before the first is changed
        if isinstance(layer, FactorizedLinear):
            refuse_quantized(layer)
    _merge_products(base, keep_rank)
    return model.merge_and_unload() if _any_adapters(base) else model.unload()


def _merge_products(base: nn.Module, keep_rank: bool) -> None:
    from corank.heal.product import LoraProduct

    layers = dict(base.named_modules())
    adapted = {name: layer for name, layer in layers.items() if isinstance(layer, LoraProduct)}
    for layer in adapted.values():
        layer.unmerge()
    done: set[str] = set()
    for names in _groups(layers).values():
        if adapted.keys().isdisjoint(names):
            continue
        members: dict[str, Any] = {n: adapted[n].base_layer if n in adapted else layers[n] for n in names}
        additions = {n: _addition(adapted[n]) for n in names if n in adapted}
        rank = members[names[0]].rank if keep_rank else None
        for name, new in grown_together(members, additions, rank).items():
            _set(base, name, members[name], new)
        done.update(names)
    for name, layer in adapted.items():
        if name not in done:
            old: Any = layer.base_layer
            _set(base, name, old, grown(old, *_addition(layer), old.rank if keep_rank else None))


def _addition(layer: Any) -> tuple[Any, Any, Any]:
    """The active adapters of a layer as one: (D, C, bias)."""
    parts = [layer.delta(name) for name in layer.active_adapters if name in layer.lora_A]
    if not parts:
        inner = layer.base_layer
        return torch.zeros(inner.out_features, 0), torch.zeros(0, inner.in_features), None
    biases = [bias for _, _, bias in parts if bias is not None]
    return (
        torch.cat([D for D, _, _ in parts], 1),
        torch.cat([C for _, C, _ in parts]),
        sum(biases[1:], biases[0]) if biases else None,
    )


def _groups(layers: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Owner of a basis -> the owner and its followers, by name."""
    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        inner = getattr(layer, "base_layer", layer)
        if isinstance(inner, SharedLowRankLinear) and not name.endswith(".base_layer"):
            groups.setdefault(inner.basis, [inner.basis]).append(name)
    return groups


def _set(base: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    base.set_submodule(name, put_in_place(old, new).requires_grad_(False))


def _any_adapters(base: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(layer, BaseTunerLayer) for layer in base.modules())


def _chosen(model: nn.Module, targets: Iterable[str] | None, ignore: Iterable[str] | None) -> list[str]:
    """Names of the linear maps to adapt: dense or factorized, not the output head, no embedding, no convolution."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    inside: tuple[str, ...] = ()
    sites = []
    for name, layer in model.named_modules():
        factorized = isinstance(layer, FactorizedLinear)
        if layer is head or name.startswith(inside):
            inside += (f"{name}.",) if layer is head else ()
            continue
        linear = factorized and getattr(layer, "form", None) is None
        if linear or isinstance(layer, nn.Linear) or is_conv1d(layer):
            sites.append(Site(name, role_of(name), 0, shape_of(layer), name, getattr(layer, "bias", None) is not None))
        if factorized:
            inside += (f"{name}.",)
    if not sites:
        raise CorankError("The model has no linear layers to adapt.")
    return [site.name for site in select_sites(sites, targets, ignore)]


def _places(model: nn.Module, name: str, on: str) -> list[str]:
    """Names of the modules to wrap for one linear map."""
    layer = model.get_submodule(name)
    if on == "product" or not isinstance(layer, FactorizedLinear):
        return [name]
    parts: dict[str, Any] = dict(layer.named_children())
    return [f"{name}.{p}" for p, child in parts.items() if p not in layer.frozen and child.weight.numel() > 0]


def _registered(config: Any) -> Any:
    from corank.heal.product import LoraProduct

    config._register_custom_module({FactorizedLinear: LoraProduct})
    return config


def require_peft() -> Any:
    """The package peft.

    Raises:
        CorankError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise CorankError("Adapters need the package peft; install it with `pip install 'corank[train]'`.") from None
    return peft
