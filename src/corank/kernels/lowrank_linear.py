"""y = B (A x) + b as one operation, for few tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corank.kernels.launching import unsuitable

MOST = 64
"""Tokens above which two products of the library are faster."""


def lowrank_linear_twin(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain torch: x [..., n], A [k, n], B [m, k], bias [m] -> [..., m]."""
    return F.linear(F.linear(x, A), B, bias)


def supports_lowrank_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> str | None:
    """Why the kernel cannot or should not run; None if it can."""
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if tokens > MOST:
        return f"more than {MOST} tokens, for which the library's products are faster"
    if tokens == 0 or A.shape[0] == 0 or x.shape[-1] == 0:
        return "there is nothing to multiply"
    return unsuitable(x, A, B, bias, sizes=(*A.shape, *B.shape))


@torch.library.custom_op("corank::lowrank_linear", mutates_args=())
def lowrank_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = B (A x) + bias.

    Args:
        x: [..., n].
        A: [k, n].
        B: [m, k].
        bias: [m] or None.

    Returns:
        [..., m], in one kernel of two launches where `supports_lowrank_linear` says so, else by torch.
    """
    if supports_lowrank_linear(x, A, B, bias) is None:
        from corank.kernels.programs.lowrank_linear import launch

        y = launch(x.reshape(-1, x.shape[-1]).contiguous(), A, B, bias)
        if y is not None:
            return y.view(*x.shape[:-1], -1)
    return lowrank_linear_twin(x, A, B, bias)


@lowrank_linear.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], B.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, A, B, bias = inputs
    ctx.save_for_backward(x, A, B)
    ctx.biased = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, A, B = ctx.saved_tensors
    x, shape = x.reshape(-1, x.shape[-1]), x.shape
    dy = dy.reshape(-1, dy.shape[-1])
    dp = dy @ B
    needs = ctx.needs_input_grad
    return (
        (dp @ A).view(shape) if needs[0] else None,
        dp.mT @ x if needs[1] else None,
        dy.mT @ (x @ A.mT) if needs[2] else None,
        dy.sum(0) if needs[3] and ctx.biased else None,
    )


lowrank_linear.register_autograd(_backward, setup_context=_save)
