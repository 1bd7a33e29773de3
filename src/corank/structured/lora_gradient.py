"""What units matter, seen from the gradients of adapters alone (LoRAPrune, arXiv:2305.18403).

The weight is W' = W + s B A, and only A [r, in] and B [out, r] have gradients. A step B - gB, A - gA of theirs moves B A by

    - G,  G = gB A + B gA - gB gA                 [out, in]

which stands for the gradient of W'. The importance of a weight is |G W'|; that of a unit the sum over its weights, matrix by
matrix: rows of what makes it, columns of what reads it, each of these vectors divided by its norm, and added.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from corank.structured.units import Units


def product_gradient(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor) -> Tensor:
    """G = gB A + B gA - gB gA [out, in]; with B = 0, as adapters start, gA is 0 as well, and G = gB A.

    Args:
        A: [r, in].
        B: [out, r].
        gA, gB: their gradients.
    """
    return gB @ A + B @ gA - gB @ gA


def weight_importance(W: Tensor, A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, scale: float) -> Tensor:
    """|G (W + scale B A)|, elementwise [out, in]."""
    return (product_gradient(A, B, gA, gB) * (W + scale * (B @ A))).abs()


def unit_importance(units: Units, prefix: str, importance: Mapping[str, Tensor]) -> Tensor:
    """Importance of the units of one hidden vector: float64 [count].

    Args:
        units: the units.
        prefix: path of their block, with a dot at the end.
        importance: path of a matrix -> importance of its weights [out, in]; those that have no adapters have no entry.
    """
    parts: list[Tensor] = []
    for rows in units.producers:
        if prefix + rows.path in importance:
            own = importance[prefix + rows.path][rows.start : rows.start + units.count * rows.size]
            parts.append(own.double().sum(1).view(units.count, rows.size).sum(1))
    if units.name in importance:
        parts.append(importance[units.name].double().sum(0).view(units.count, units.size).sum(1))
    total = torch.zeros(units.count, dtype=torch.float64)
    for part in parts:
        norm = float(part.norm())
        total += part.cpu() / norm if norm > 0 else part.cpu()
    return total
