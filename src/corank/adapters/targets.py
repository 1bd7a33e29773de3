"""Which layers of a model adapters go to, and at what rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from corank.adaptation import Adaptation
from corank.errors import CorankError, unknown
from corank.factors import FactorizedLinear, is_conv1d, shape_of
from corank.model import Site, select_sites
from corank.model.archs import role_of


def linear_maps(model: nn.Module, ignore: Iterable[str] | None = None) -> list[Site]:
    """All linear maps of a model but its output head: dense ones, and factorized ones as a whole.

    Args:
        model: without adapters.
        ignore: last names of modules that are left out with all that is in them, such as "classifier".

    Raises:
        CorankError: there are none.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    left_out = set(ignore or ())
    inside: tuple[str, ...] = ()
    found = []
    for name, layer in model.named_modules():
        if name.startswith(inside):
            continue
        if (head is not None and layer is head) or name.rpartition(".")[2] in left_out:
            inside += (f"{name}.",)
            continue
        factorized = isinstance(layer, FactorizedLinear)
        if (factorized and getattr(layer, "form", None) is None) or isinstance(layer, nn.Linear) or is_conv1d(layer):
            bias = getattr(layer, "bias", None) is not None
            found.append(Site(name, role_of(name), 0, shape_of(layer), name, bias))
        if factorized:
            inside += (f"{name}.",)
    if not found:
        raise CorankError("The model has no linear layers to adapt.")
    return found


def chosen(
    model: nn.Module,
    adaptation: Adaptation,
    targets: Iterable[str] | None,
    ignore: Iterable[str] | None,
    ranks: Mapping[str, int],
    apart: Iterable[str] | None,
) -> dict[str, int]:
    """Name -> rank of the linear maps to adapt.

    Args:
        model: without adapters.
        adaptation: the method.
        targets, ignore: as for `corank.model.select_sites`.
        ranks: role, glob or ``re:`` pattern -> rank of the matrices it matches, in place of the method's; the last
            that matches counts.
        apart: names of modules that are trained as a whole.

    Raises:
        CorankError: a pattern that matches nothing, a rank larger than a matrix, a layer this method cannot adapt,
            nothing that would train.
    """
    sites = select_sites(linear_maps(model, apart), targets, ignore)
    rank_of = {site.name: adaptation.rank for site in sites}
    for pattern, rank in ranks.items():
        if rank < 1:
            raise CorankError(f"The rank of an adapter must be at least 1, got {rank} for {pattern!r}.")
        rank_of |= {site.name: rank for site in select_sites(sites, [pattern])}
    found = {}
    for site in sites:
        layer: Any = model.get_submodule(site.name)
        refuse_quantized(site.name, layer)
        if isinstance(layer, FactorizedLinear):
            if not adaptation.link:
                raise CorankError(
                    f"{site.name} is factorized, and this method takes columns or components of a dense matrix; use "
                    "the adapter curing, which trains the link between factors, or corank.heal.lora_config."
                )
            if layer.rank:
                found[site.name] = layer.rank
            continue
        if rank_of[site.name] > min(site.shape):
            raise CorankError(
                f"A rank of {rank_of[site.name]} is larger than {site.name} [{site.shape[0]}, {site.shape[1]}] has; give at "
                f"most {min(site.shape)}, ranks={{{site.role!r}: {min(site.shape)}}}, or leave it out with ignore."
            )
        found[site.name] = rank_of[site.name]
    if not found:
        raise CorankError("Nothing would train: all chosen layers have rank 0; choose others with targets.")
    return found


def refuse_quantized(name: str, layer: Any) -> None:
    """Raise CorankError if a layer holds integers, which cannot be merged into and whose columns are not its own."""
    parts = [layer, *layer.children()]
    weights = [w for w in (getattr(part, "weight", None) for part in parts) if w is not None]
    if any(hasattr(w, "qdata") or not w.dtype.is_floating_point for w in weights):
        raise CorankError(f"{name} is quantized; attach adapters first and quantize last.")


def stacks(model: nn.Module, ranks: Mapping[str, int], grouping: str) -> list[list[str]]:
    """The chosen layers as stacks of matrices of one shape and one rank of the adapter, in the order of the model.

    Args:
        model: it has them.
        ranks: name of a dense layer -> rank.
        grouping: "shape", or "role": one stack for each role and shape.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, rank in ranks.items():
        key = (shape_of(model.get_submodule(name)), rank, role_of(name) if grouping == "role" else None)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def check_known(what: str, names: Iterable[str], model: nn.Module) -> None:
    """Raise CorankError, naming the nearest, unless each name is the last part of a module's name."""
    known = {part for name, _ in model.named_modules() for part in [name.rpartition(".")[2]] if part}
    for name in names:
        if name not in known:
            raise unknown(what, name, known)
