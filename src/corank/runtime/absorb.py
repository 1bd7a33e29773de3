"""Permutations of pivoted layers moved into their neighbours, so that nothing is gathered any more.

A row-pivoted layer computes its pivot outputs, then the others, and puts them in order. Where what follows treats every
output alike, the order is free: the layer may hand over (pivots, others) as they come if its neighbours agree.

| layer | free? | absorbed by |
|---|---|---|
| gate or up of an MLP | yes, one of them (both if they have the same pivots) | rows of the other, columns of `down` |
| the first matrix of an MLP without a gate | yes | columns of `down` |
| v | inside a head: with a single key head | columns of `o`, head by head |
| q, k | no | rotation pairs their outputs |
| o, down | no | their outputs are added to the residual stream, which has an order |

Weights and pivots change, the model's outputs do not, and the result is saved like any other model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from corank.factors import (
    ColumnPivotedLinear,
    CURLinear,
    DenseLinear,
    LowRankLinear,
    RowPivotedLinear,
    SharedLowRankLinear,
)
from corank.factors.pivots import complement
from corank.runtime.attention import LatentAttention, confirmed, plan_of
from corank.runtime.forms import form_of
from corank.runtime.override import uninstall

_PAIRS = (LowRankLinear, CURLinear, ColumnPivotedLinear)


def absorb(model: nn.Module) -> dict[str, str]:
    """Free every row-pivoted layer from its gather where that is legal, in place.

    Args:
        model: any model; its runtime becomes `torch`.

    Returns:
        name of each row-pivoted layer -> "absorbed", "in order already", or why it keeps its gather.
    """
    uninstall(model)
    vars(model).pop("_corank_runtime", None)
    pivoted = {m: name for name, m in model.named_modules() if isinstance(m, RowPivotedLinear)}
    said = {name: "its outputs have an order that others rely on" for name in pivoted.values()}
    for layer, name in pivoted.items():
        if in_order(layer):
            said[name] = "in order already"
    for module in model.modules():
        neighbours = _of_mlp(module) or _of_attention(module)
        if neighbours is None:
            continue
        candidates, last, heads = neighbours
        for layer in candidates:
            if layer not in pivoted or in_order(layer):
                continue
            others = [o for o in candidates if o is not layer]
            if any(isinstance(other, RowPivotedLinear) and in_order(other) for other in others):
                said[pivoted[layer]] = "its sibling's permutation is another one"
                continue
            said[pivoted[layer]] = _absorb(layer, others, last, heads)
            for other in others:
                if other in pivoted and in_order(other):
                    said[pivoted[other]] = "absorbed"
    return said


def in_order(layer: Any) -> bool:
    """Whether the pivots of a layer are its first outputs."""
    return bool((layer.pivots == torch.arange(layer.rank, device=layer.pivots.device)).all())


def _of_mlp(module: Any) -> tuple[list[Any], Any, int] | None:
    """(layers that may be permuted together, the one that reads them, 1) of an MLP."""
    children = list(module.children())
    form = form_of(module) if any(isinstance(child, RowPivotedLinear) for child in children) else None
    if form is None or not _elementwise(getattr(module, form.act), getattr(module, form.gate).out_features):
        return None
    first = [getattr(module, name) for name in (form.gate, form.up) if name is not None]
    return first, getattr(module, form.down), 1


def _of_attention(module: Any) -> tuple[list[Any], Any, int] | None:
    """([v], o, query heads) of an attention with a single key head."""
    plan = plan_of(module)
    if plan is None or plan.o is None or plan.groups != 1 or not isinstance(getattr(module, plan.v), RowPivotedLinear):
        return None
    if not confirmed(LatentAttention(module, plan)):
        return None
    return [getattr(module, plan.v)], getattr(module, plan.o), plan.heads


def _elementwise(act: Callable[[Tensor], Tensor], size: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, order = torch.randn(3, size, generator=generator), torch.randperm(size, generator=generator)
    return torch.allclose(act(x)[:, order], act(x[:, order]))  # the last bits may depend on the place in a vector


def _absorb(layer: RowPivotedLinear, siblings: list[Any], last: Any, heads: int) -> str:
    """Let `layer` give its outputs as (pivots, others)."""
    order = torch.cat([layer.pivots.long(), complement(layer.pivots, layer.out_features)])
    columns = torch.cat([order + h * layer.out_features for h in range(heads)])
    for other in siblings:
        if not _plain(other) or type(other) not in (
            *_PAIRS,
            SharedLowRankLinear,
            RowPivotedLinear,
            nn.Linear,
            DenseLinear,
        ):
            return f"a sibling is a {type(other).__name__}, whose rows cannot be permuted"
    if not _plain(last) or type(last) not in (*_PAIRS, RowPivotedLinear, nn.Linear, DenseLinear):
        return f"the next layer is a {type(last).__name__}, whose columns cannot be permuted"
    if getattr(last, "followed", False):
        return "the next layer shares its basis with others"
    with torch.no_grad():
        for other in (layer, *siblings):
            permute_rows(other, order)
        permute_columns(last, columns)
    return "absorbed"


def _plain(layer: nn.Module) -> bool:
    """Whether all weights are ordinary tensors of linear layers (no adapters, no integers)."""
    inner = [m for m in layer.modules() if m is not layer]
    linears = all(type(m) is nn.Linear for m in inner)
    return linears and all(type(m.weight) in (Tensor, nn.Parameter) for m in (inner or [layer]))


def permute_rows(layer: Any, order: Tensor) -> None:
    """Output j of a layer becomes what output order[j] was.

    Args:
        layer: dense or of any kind.
        order: [out], a permutation.
    """
    if isinstance(layer, RowPivotedLinear):
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[order])
        place = order.argsort()
        others = place[complement(layer.pivots, layer.out_features)]
        layer.pivots.copy_(place[layer.pivots.long()])
        layer.up.weight.copy_(layer.up.weight[others.argsort()])
        layer.finalize()
        return
    holder = layer if isinstance(layer, nn.Linear) else layer.up
    holder.weight.copy_(holder.weight[order])
    if holder.bias is not None:
        holder.bias.copy_(holder.bias[order])


def permute_columns(layer: Any, order: Tensor) -> None:
    """Input j of a layer becomes what input order[j] was.

    Args:
        layer: dense or of any kind, with a basis of its own.
        order: [in], a permutation.
    """
    if isinstance(layer, ColumnPivotedLinear):
        place = order.argsort()
        others = place[complement(layer.pivots, layer.in_features)]
        layer.pivots.copy_(place[layer.pivots.long()])
        layer.down.weight.copy_(layer.down.weight[:, others.argsort()])
        layer.finalize()
        return
    holder = layer if isinstance(layer, nn.Linear) else layer.down
    holder.weight.copy_(holder.weight[:, order])
