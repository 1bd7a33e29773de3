"""A factorized MLP as one operation that never writes [tokens, intermediate]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corank.kernels.launching import unsuitable

#: activation -> its plain form
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
MOST_RANK = 2048
"""Of `down`: the sums of 16 tokens at this rank fill the registers of a block."""
WIDE = 256
"""With more than 64 tokens and a rank above this, products of the library over chunks of tokens are faster."""


def lowrank_mlp_twin(
    x: Tensor,
    A: Tensor,
    Bg: Tensor,
    Bu: Tensor | None,
    Ad: Tensor,
    Bd: Tensor,
    bg: Tensor | None = None,
    bu: Tensor | None = None,
    bd: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """The same in plain torch; arguments as for `lowrank_mlp`."""
    z = F.linear(x, A)
    h = ACTIVATIONS[act](F.linear(z[..., : Bg.shape[1]], Bg, bg))
    if Bu is not None:
        h = h * F.linear(z[..., Bg.shape[1] :], Bu, bu)
    return F.linear(F.linear(h, Ad), Bd, bd)


def supports_lowrank_mlp(
    x: Tensor,
    A: Tensor,
    Bg: Tensor,
    Bu: Tensor | None,
    Ad: Tensor,
    Bd: Tensor,
    bg: Tensor | None = None,
    bu: Tensor | None = None,
    bd: Tensor | None = None,
    act: str = "silu",
) -> str | None:
    """Why the kernel cannot or should not run; None if it can."""
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if act not in ACTIVATIONS:
        return f"there is no kernel with the activation {act}"
    if tokens == 0 or x.shape[-1] == 0 or Ad.numel() == 0:
        return "there is nothing to multiply"
    ranks = (Bg.shape[1], 0 if Bu is None else Bu.shape[1], Ad.shape[0])
    if max(ranks) > (MOST_RANK if tokens <= 64 else WIDE):
        return f"the rank is above {MOST_RANK if tokens <= 64 else WIDE}"
    return unsuitable(
        x, A, Bg, Bu, Ad, Bd, bg, bu, bd, sizes=(*Bg.shape, *(Bu.shape if Bu is not None else ()), *Ad.shape)
    )


@torch.library.custom_op("corank::lowrank_mlp", mutates_args=())
def lowrank_mlp(
    x: Tensor,
    A: Tensor,
    Bg: Tensor,
    Bu: Tensor | None,
    Ad: Tensor,
    Bd: Tensor,
    bg: Tensor | None = None,
    bu: Tensor | None = None,
    bd: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """y = Bd Ad (act(Bg z_g + bg) * (Bu z_u + bu)) + bd with (z_g, z_u) = A x.

    Args:
        x: [..., n].
        A: [rg + ru, n], first factors of gate and up; [rg, n] without `up`.
        Bg: [D, rg].
        Bu: [D, ru], or None for an MLP without a gated product.
        Ad: [rd, D].
        Bd: [m, rd].
        bg, bu: [D] or None.
        bd: [m] or None.
        act: one of `ACTIVATIONS`.

    Returns:
        [..., m].
    """
    if supports_lowrank_mlp(x, A, Bg, Bu, Ad, Bd, bg, bu, bd, act) is None:
        from corank.kernels.programs.lowrank_mlp import launch

        z = F.linear(x.reshape(-1, x.shape[-1]), A)
        s = launch(z, Bg, Bu, Ad, bg, bu, act)
        if s is not None:
            return F.linear(s, Bd, bd).view(*x.shape[:-1], -1)
    return lowrank_mlp_twin(x, A, Bg, Bu, Ad, Bd, bg, bu, bd, act)


@lowrank_mlp.register_fake
def _(
    x: Tensor,
    A: Tensor,
    Bg: Tensor,
    Bu: Tensor | None,
    Ad: Tensor,
    Bd: Tensor,
    bg: Tensor | None = None,
    bu: Tensor | None = None,
    bd: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    return x.new_empty(*x.shape[:-1], Bd.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, act = inputs
    ctx.save_for_backward(*tensors)
    ctx.act = act


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    def twin(*tensors: Any) -> Tensor:
        return lowrank_mlp_twin(*tensors, **{"act": ctx.act})

    return (*through_twin(twin, ctx, dy), None)


def through_twin(twin: Callable[..., Tensor], ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the saved tensors, by computing the plain form again."""
    needs = ctx.needs_input_grad[: len(ctx.saved_tensors)]
    with torch.enable_grad():
        tensors = [
            None if t is None else t.detach().requires_grad_(need and t.is_floating_point())
            for t, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        y = twin(*tensors)
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(y, wanted, dy))
    return tuple(next(grads) if t is not None and t.requires_grad else None for t in tensors)


lowrank_mlp.register_autograd(_backward, setup_context=_save)
