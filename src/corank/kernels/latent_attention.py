"""Attention whose keys and values are rebuilt from latents, as one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corank.kernels.launching import unsuitable
from corank.kernels.lowrank_mlp import through_twin

MOST_RANK = 256
"""Of keys and values: above it, rebuilding a tile costs more than the attention it is for."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, heads, T, dh] with halves as pairs; cos and sin [B or 1, T, dh / 2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def visible(
    T: int, TQ: int, causal: bool, q_offset: int, window: int, pad: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys a query may see, bool [B or 1, 1, TQ, T]."""
    n = torch.arange(T, device=device)
    position = q_offset + torch.arange(TQ, device=device)[:, None]
    seen = torch.ones(TQ, T, dtype=torch.bool, device=device)
    if causal:
        seen &= n <= position
    if window > 0:
        seen &= n > position - window
    return seen[None, None] if pad is None else seen[None, None] & pad[:, None, None, :].bool()


def latent_attention_twin(
    q: Tensor,
    pk: Tensor,
    pv: Tensor,
    Vk: Tensor,
    Vv: Tensor,
    bk: Tensor | None = None,
    bv: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    pad: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    q_offset: int = 0,
    window: int = 0,
) -> Tensor:
    """The same in plain torch; arguments as for `latent_attention`."""
    k, v = pk @ Vk, pv @ Vv
    k = k if bk is None else k + bk[:, None]
    v = v if bv is None else v + bv[:, None]
    if cos is not None and sin is not None:
        k = rotate(k, cos.to(k.dtype), sin.to(k.dtype))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = visible(k.shape[2], q.shape[2], causal, q_offset, window, pad, q.device)
    scores = (q @ k.mT).float() * scale if q.dtype != torch.float64 else q @ k.mT * scale
    weights = scores.masked_fill(~seen, -1e30).softmax(-1).masked_fill(~seen, 0.0)
    return weights.to(v.dtype) @ v


def supports_latent_attention(
    q: Tensor,
    pk: Tensor,
    pv: Tensor,
    Vk: Tensor,
    Vv: Tensor,
    bk: Tensor | None = None,
    bv: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    pad: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    q_offset: int = 0,
    window: int = 0,
) -> str | None:
    """Why the kernel cannot or should not run; None if it can."""
    if q.numel() == 0 or pk.shape[2] == 0 or Vk.shape[1] == 0 or Vv.numel() == 0:
        return "there is nothing to attend to"
    if max(Vk.shape[1], Vv.shape[1]) > MOST_RANK:
        return f"the rank is above {MOST_RANK}"
    if cos is not None and q.shape[-1] % 2:
        return "the heads have an odd size"
    if max(q.shape[-1], Vv.shape[-1]) > 256:
        return "the heads are larger than 256"
    return unsuitable(q, pk, pv, Vk, Vv, bk, bv, sizes=(Vk.shape[1], Vv.shape[1], q.shape[-1], Vv.shape[-1]))


@torch.library.custom_op("corank::latent_attention", mutates_args=())
def latent_attention(
    q: Tensor,
    pk: Tensor,
    pv: Tensor,
    Vk: Tensor,
    Vv: Tensor,
    bk: Tensor | None = None,
    bv: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    pad: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    q_offset: int = 0,
    window: int = 0,
) -> Tensor:
    """softmax(q K^T scale) V with K = pk Vk + bk (rotated) and V = pv Vv + bv, heads of keys shared by groups of queries.

    Args:
        q: [B, H, Tq, dh], with its bias and rotation.
        pk: latents of the keys, [B, 1, T, rk], or [B, Hkv, T, rk] if each head has its own.
        pv: of the values, [B, 1 or Hkv, T, rv].
        Vk: [Hkv, rk, dh].
        Vv: [Hkv, rv, dv].
        bk, bv: [Hkv, dh] and [Hkv, dv], or None.
        cos, sin: [B or 1, T, dh / 2], applied to the keys; None for none.
        pad: [B, T], zero where a key is padding, or None.
        causal: a query sees keys up to its own position.
        scale: of the scores.
        q_offset: position of the first query.
        window: a query sees so many keys up to its own position; 0 for all.

    Returns:
        [B, H, Tq, dv]; zeros for a query that may see nothing.
    """
    if supports_latent_attention(q, pk, pv, Vk, Vv, bk, bv, cos, sin, pad, causal, scale, q_offset, window) is None:
        from corank.kernels.programs.latent_attention import launch

        row = lambda t: None if t is None else t.contiguous()  # noqa: E731
        pads = None if pad is None else pad.ne(0).to(torch.int8).contiguous()
        q = q if q.stride(-1) == 1 else q.contiguous()
        o = launch(q, pk, pv, Vk, Vv, row(bk), row(bv), row(cos), row(sin), pads, causal, scale, q_offset, window)
        if o is not None:
            return o
    return latent_attention_twin(q, pk, pv, Vk, Vv, bk, bv, cos, sin, pad, causal, scale, q_offset, window)


@latent_attention.register_fake
def _(
    q: Tensor,
    pk: Tensor,
    pv: Tensor,
    Vk: Tensor,
    Vv: Tensor,
    bk: Tensor | None = None,
    bv: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    pad: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    q_offset: int = 0,
    window: int = 0,
) -> Tensor:
    return q.new_empty(*q.shape[:-1], Vv.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.options = inputs[:10], inputs[10:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    grads = through_twin(lambda *tensors: latent_attention_twin(*tensors, *ctx.options), ctx, do)
    return (*grads, None, None, None, None)


latent_attention.register_autograd(_backward, setup_context=_save)
