"""Row-pivoted layers as one operation: the product writes its entries to where they belong."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corank.kernels.launching import unsuitable
from corank.kernels.lowrank_linear import MOST


def pivot_linear_twin(
    x: Tensor, rows: Tensor, rest: Tensor, pivots: Tensor, others: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same in plain torch; arguments as for `pivot_linear`."""
    z = F.linear(x, rows)
    index = torch.cat([pivots, others]).argsort()
    y = torch.cat([z, F.linear(z, rest)], dim=-1).index_select(-1, index)
    return y if bias is None else y + bias


def supports_pivot_linear(
    x: Tensor, rows: Tensor, rest: Tensor, pivots: Tensor, others: Tensor, bias: Tensor | None = None
) -> str | None:
    """Why the kernel cannot or should not run; None if it can."""
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if tokens > MOST:
        return f"more than {MOST} tokens, for which the library's products are faster"
    if tokens == 0 or rows.numel() == 0:
        return "there is nothing to multiply"
    if pivots.dtype != torch.int32 or others.dtype != torch.int32:
        return "the indices are not 32-bit"
    return unsuitable(x, rows, rest, pivots, others, bias, sizes=(*rows.shape, *rest.shape))


@torch.library.custom_op("corank::pivot_linear", mutates_args=())
def pivot_linear(
    x: Tensor, rows: Tensor, rest: Tensor, pivots: Tensor, others: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y[pivots] = z and y[others] = rest z with z = rows x, plus bias.

    Args:
        x: [..., n].
        rows: [k, n].
        rest: [m - k, k].
        pivots: [k] int32, distinct.
        others: [m - k] int32, the other indices below m.
        bias: [m] or None.

    Returns:
        [..., m]; the kernel scatters as it stores.
    """
    if supports_pivot_linear(x, rows, rest, pivots, others, bias) is None:
        from corank.kernels.programs.lowrank_linear import launch

        y = launch(x.reshape(-1, x.shape[-1]).contiguous(), rows, rest, bias, pivots, others)
        if y is not None:
            return y.view(*x.shape[:-1], -1)
    return pivot_linear_twin(x, rows, rest, pivots, others, bias)


@pivot_linear.register_fake
def _(x: Tensor, rows: Tensor, rest: Tensor, pivots: Tensor, others: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows.shape[0] + rest.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rows, rest, pivots, others, bias = inputs
    ctx.save_for_backward(x, rows, rest, pivots, others)
    ctx.biased = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, rows, rest, pivots, others = ctx.saved_tensors
    x, shape = x.reshape(-1, x.shape[-1]), x.shape
    dy = dy.reshape(-1, dy.shape[-1])
    picked, combined = dy.index_select(-1, pivots), dy.index_select(-1, others)
    dz = picked + combined @ rest
    needs = ctx.needs_input_grad
    return (
        (dz @ rows).view(shape) if needs[0] else None,
        dz.mT @ x if needs[1] else None,
        combined.mT @ (x @ rows.mT) if needs[2] else None,
        None,
        None,
        dy.sum(0) if needs[5] and ctx.biased else None,
    )


pivot_linear.register_autograd(_backward, setup_context=_save)
