"""y = W' x on one rank, from the tensors that `weights` has placed. Pure torch, no branch on values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corank.serve.vllm.weights import Part, Parts


def apply(layer: Any, parts: Parts, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The outputs of a layer on this rank; under row parallelism the rank's share of a sum that the layer completes.

    One product with the input for all first factors together and one for all dense matrices, then one per matrix.

    Args:
        layer: vLLM's linear layer, loaded.
        x: [..., in on this rank].
        bias: [out on this rank] or None.

    Returns:
        [..., out on this rank].
    """
    down = getattr(layer, "down", None)
    hidden = x if down is None or not down.weight.numel() else F.linear(x, down.weight)
    dense = F.linear(x, layer.weight) if layer.weight.numel() else x
    outputs = []
    for part in parts.parts:
        own = None if bias is None else bias.narrow(0, part.offset, part.rows)
        if part.kind == "dense":
            assert part.span is not None
            y = dense.narrow(-1, part.span[0], part.rows)
            outputs.append(y if own is None else y + own)
        else:
            outputs.append(_factorized(layer, part, x, hidden, own))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _factorized(layer: Any, part: Part, x: Tensor, hidden: Tensor, bias: Tensor | None) -> Tensor:
    if part.rank == 0:
        zeros = x.new_zeros(*x.shape[:-1], part.rows)
        return zeros if bias is None else zeros + bias
    held: Any = part.held
    z = _latent(layer, part, x, hidden)
    if part.kind == "row_pivoted":
        y = torch.cat([z, F.linear(z, held.up)], dim=-1).index_select(-1, held.index)
        return y if bias is None else y + bias
    return F.linear(z, held.up, bias)


def _latent(layer: Any, part: Part, x: Tensor, hidden: Tensor) -> Tensor:
    """[..., k]: what the last factor is applied to."""
    held: Any = part.held
    if part.kind == "shared":
        assert part.owner is not None
        home, owner = part.owner
        assert owner.span is not None
        if home is not layer:
            basis: Tensor = home.down.weight  # type: ignore[assignment, union-attr]
            return F.linear(x, basis.narrow(0, owner.span[0], owner.rank))
        return hidden.narrow(-1, owner.span[0], owner.rank)
    if part.kind == "column_pivoted":
        pivoted = F.pad(x, (0, 1)).index_select(-1, held.take)  # the zero that is appended stands for pivots elsewhere
        return pivoted + F.linear(x.index_select(-1, held.others), held.down)
    assert part.span is not None
    z = hidden.narrow(-1, part.span[0], part.rank)
    return F.linear(z, held.link) if part.kind == "cur" else z
