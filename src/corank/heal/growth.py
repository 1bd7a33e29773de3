"""Adding a low-rank matrix to a factorized layer: W' + D C, exact with a larger rank, or the best of the old rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.factors import (
    ColumnPivoted,
    Dense,
    FactorizedLinear,
    Factors,
    LowRank,
    SharedBasis,
    packed,
    replace,
    weight_of,
)
from corank.linalg import pack, truncate


def grown(layer: Any, D: Tensor, C: Tensor, bias: Tensor | None = None, rank: int | None = None) -> nn.Module:
    """A layer that computes W' x + D C x + bias.

    Low rank: up <- [up, D], down <- [down; C], nothing is rounded but D and C to the layer's dtype. A pivoted layer
    is one of larger rank with new pivots. A CUR plus a low-rank matrix has neither rows nor columns of W, so it
    becomes low rank, with its link absorbed. Where the result would not be smaller than the matrix it is dense.

    Args:
        layer: factorized [m, n], not sharing a basis; or dense, after an earlier growth.
        D: [m, r].
        C: [r, n].
        bias: [m] or None; added to that of the layer.
        rank: truncate the sum to this rank, optimally in the Frobenius norm; None keeps all of it.

    Returns:
        A new layer, not yet in place; parameters are copies.

    Raises:
        CorankError: the factors are quantized.
    """
    if not isinstance(layer, FactorizedLinear):
        W = weight_of(layer)
        return Dense(W + (D @ C).to(W)).module(_sum(layer.bias, bias))
    refuse_quantized(layer)
    B, A = layer.factors().pair()
    B, A = torch.cat([B, D.to(B)], 1), torch.cat([A, C.to(A)])
    if rank is not None:
        B, A = truncated(B, A, rank)
    own: Any = layer.bias
    return stored(layer.kind, B, A).module(_sum(own, bias))


def grown_together(
    layers: Mapping[str, Any],
    additions: Mapping[str, tuple[Tensor, Tensor, Tensor | None]],
    rank: int | None = None,
) -> dict[str, nn.Module]:
    """The same for layers that share one basis, which keep sharing one.

    The new basis is [A; C_1; C_2; ...], and each layer has zeros for the parts that are not its own. With `rank` all
    of them together are truncated: the basis of that rank with the least sum of squared errors over the layers.

    Args:
        layers: name -> layer, the owner of the basis first, then all its followers.
        additions: name -> (D [m_i, r_i], C [r_i, n], bias [m_i] or None); names without an addition are left out.
        rank: of the new basis; None keeps all of it.

    Returns:
        name -> new layer, wired to each other, not yet in place.

    Raises:
        CorankError: the factors are quantized.
    """
    for layer in layers.values():
        refuse_quantized(layer)
    pairs = {name: layer.factors().pair() for name, layer in layers.items()}
    A = next(iter(pairs.values()))[1]
    basis = torch.cat([A, *(C.to(A) for _, C, _ in additions.values())])
    coefficients = {}
    for name, (B, _) in pairs.items():
        own = [
            (D if other == name else torch.zeros(len(B), D.shape[1])).to(B) for other, (D, _, _) in additions.items()
        ]
        coefficients[name] = torch.cat([B, *own], 1)
    if rank is not None:
        stacked, basis = truncated(torch.cat(list(coefficients.values())), basis, rank)
        blocks = stacked.split([len(B) for B in coefficients.values()])
        coefficients = dict(zip(coefficients, blocks, strict=True))
    biases = {
        name: _sum(layer.bias, additions[name][2] if name in additions else None) for name, layer in layers.items()
    }
    shared = SharedBasis(basis, coefficients)
    if shared.numel >= sum(len(B) for B in coefficients.values()) * basis.shape[1]:
        return {name: Dense(LowRank(B, basis).dense()).module(biases[name]) for name, B in coefficients.items()}
    return dict(shared.modules(biases))


def truncated(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of rank `rank` whose product is nearest to B A in the Frobenius norm (Eckart and Young 1936).

    Only the small core between the orthonormal bases of B and A is decomposed, in fp64.

    Args:
        B: [m, k].
        A: [k, n].
        rank: more than the rank of B A changes nothing.

    Returns:
        ([m, rank], [rank, n]) in the dtype of B.
    """
    Q, left = torch.linalg.qr(B.double())
    P, right = torch.linalg.qr(A.double().T)
    core = left @ right.T
    rank = min(rank, *core.shape)
    up, down = truncate(core, rank=rank).pair(core, rank)
    return (Q @ up).to(B.dtype), (down @ P.T).to(B.dtype)


def stored(kind: str, B: Tensor, A: Tensor) -> Factors:
    """B A as factors of the kind (low rank for CUR), or dense where they would not be smaller."""
    low, m, n = LowRank(B, A), B.shape[0], A.shape[1]
    pivoted = kind in ("row_pivoted", "column_pivoted")
    size = ColumnPivoted.count(m, n, low.rank) if pivoted else low.numel
    if size >= m * n:
        return Dense(low.dense())
    if kind == "row_pivoted":
        return packed(low)
    if kind == "column_pivoted":
        wide = torch.promote_types(B.dtype, torch.float32)
        turned = pack(A.T.to(wide), B.T.to(wide))  # the rows of the transpose are the columns
        return ColumnPivoted(turned.pivots.to(torch.int32), turned.rows.T, turned.rest.T).astype(B.dtype)
    return low


def put_in_place(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new` with what a layer takes over from the one it replaces: mode, storage, whether its bias is an extra."""
    holder: Any = nn.Module()
    holder.layer = old
    replace(holder, "layer", new)
    return holder.layer


def refuse_quantized(layer: FactorizedLinear) -> None:
    """Raise `CorankError` if the layer's factors are quantized: growing them would undo that in silence."""
    for part in layer.children():
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and hasattr(weight, "qdata"):
            raise CorankError(
                "The factors are quantized; put the adapter on the model before it was quantized, merge it there, and "
                "quantize the result."
            )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b.to(a)
