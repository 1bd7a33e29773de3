"""Attention a group of heads at a time, straight from the latents.

Queries, keys and values of all heads, and their rotated copies, are as large as several hidden states. From the latents
x A^T, which are narrow, those of a few heads can be made, used and let go; the memory that FlashSVD (arXiv:2508.01506)
saves in attention, with the products and the attention of the library. Where a cache is filled, it needs all keys and
values; queries and outputs still go by groups. A kernel that rebuilds keys and values tile by tile takes over where it
suits and nobody else wants to see them.

Which modules can be computed this way is found out from their children and confirmed by their own output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corank.factors import FactorizedLinear, LowRankLinear, SharedLowRankLinear, shape_of
from corank.kernels import latent_attention, supports_latent_attention
from corank.model.archs import role_of
from corank.runtime.forms import is_linear
from corank.runtime.mlp import LEAST
from corank.runtime.override import Override, inference, note
from corank.runtime.packing import is_plain, unwatched


@dataclass(frozen=True)
class Plan:
    """Names and sizes of an attention module.

    Attributes:
        q, k, v, o: children; `o` is None where the output projection belongs to another module.
        size: of a head.
        heads, groups: numbers of query heads and of key heads.
        rotary: whether queries and keys are rotated.
    """

    q: str
    k: str
    v: str
    o: str | None
    size: int
    heads: int
    groups: int
    rotary: bool


class LatentAttention(Override):
    """Attention by groups of heads.

    Args:
        module: the attention module.
        plan: of its children.
        kernel: rebuild keys and values inside a kernel where it suits.
        least: tokens below which the module computes as it always does: there is nothing to save, and a step of
            decoding would only be launched in more pieces. None chooses by device.

    Attributes:
        caches: whether it may also fill a cache.
    """

    def __init__(self, module: nn.Module, plan: Plan, kernel: bool = False, least: int | None = None):
        super().__init__(module)
        self.plan = plan
        self.kernel = kernel
        self.least = least
        self.caches = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.dim() != 3 or not inference(self.module):
            return self.original(*args, **kwargs)
        least = LEAST.get(x.device.type, LEAST["cuda"]) if self.least is None else self.least
        call = self._read(args[1:], kwargs) if x.shape[0] * x.shape[1] >= least else None
        return self.original(*args, **kwargs) if call is None else (self.attend(x, *call), None)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor | None, Any] | None:
        """(cosine and sine, mask, cache) of a call; None if it asks for what cannot be given."""
        names = ("position_embeddings", "attention_mask") if self.plan.rotary else ("attention_mask",)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        if len(args) > len(names) or (cache is not None and not self.caches) or given.get("past_key_value") is not None:
            return None
        if given.get("output_attentions") or given.get("is_causal") is not None:
            return None
        rope, mask = given.get("position_embeddings"), given.get("attention_mask")
        config: Any = self.module.config
        form = config._attn_implementation
        if form not in ("sdpa", "eager"):
            return None
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1):
            return None
        if mask is None and form == "eager" and self.causal:
            return None  # the eager form leaves it to the mask
        if self.plan.rotary and (rope is None or rope[0].dim() != 3 or rope[0].shape[-1] != self.plan.size):
            return None
        return rope, mask, cache

    @property
    def causal(self) -> bool:
        """Whether a query sees no later key, where no mask says what it sees."""
        return bool(getattr(self.module, "is_causal", False))

    def attend(self, x: Tensor, rope: Any, mask: Tensor | None, cache: Any = None) -> Tensor:
        """The attention's output for x [batch, tokens, in]."""
        plan, module = self.plan, self.module
        q, k, v = (_Heads(getattr(module, name), x, plan.size) for name in (plan.q, plan.k, plan.v))
        if cache is not None:
            every = slice(0, plan.groups)
            keys, values = cache.update(_rotated(k.heads(every), rope), v.heads(every), module.layer_idx)
        share = plan.heads // plan.groups
        out = x.new_empty(*x.shape[:2], plan.heads * plan.size)
        view = out.view(*x.shape[:2], plan.heads, plan.size)
        for g in range(plan.groups):
            span = slice(g * share, (g + 1) * share)
            Q = _rotated(q.heads(span), rope)
            if cache is None:
                O = self._one(Q, k, v, g, rope, mask)
            else:
                O = self._attention(Q, keys[:, g : g + 1], values[:, g : g + 1], mask)
            view[:, :, span] = O.transpose(1, 2)
        del q, k, v
        return out if plan.o is None else getattr(module, plan.o)(out)

    def _one(self, Q: Tensor, k: _Heads, v: _Heads, g: int, rope: Any, mask: Tensor | None) -> Tensor:
        """Output [batch, heads, tokens, size] of the query heads that read key head g."""
        pad = _padding(mask, self.causal) if self.kernel else None
        if self.kernel and k.latent is not None and v.latent is not None and (mask is None or pad is not None):
            Vk, bk = k.factor(g)
            Vv, bv = v.factor(g)
            half = self.plan.size // 2
            scale = float(self.module.scaling)  # type: ignore[arg-type]
            cos, sin = (None, None) if rope is None else (rope[0][..., :half], rope[1][..., :half])
            arguments = (Q, k.latent[:, None], v.latent[:, None], Vk, Vv, bk, bv, cos, sin, pad, self.causal, scale)
            reason = supports_latent_attention(*arguments)
            if reason is None:
                return latent_attention(*arguments)
            note(f"no kernel computes attention from latents: {reason}")
        span = slice(g, g + 1)
        return self._attention(Q, _rotated(k.heads(span), rope), v.heads(span), mask)

    def _attention(self, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None) -> Tensor:
        """The library's attention of several query heads and one key head."""
        scale = float(self.module.scaling)  # type: ignore[arg-type]
        causal = mask is None and self.causal and Q.shape[2] > 1
        K, V = K.expand(-1, Q.shape[1], -1, -1), V.expand(-1, Q.shape[1], -1, -1)
        return F.scaled_dot_product_attention(Q, K, V, attn_mask=mask, is_causal=causal, scale=scale)


class _Heads:
    """Heads of a projection of x, made when they are asked for if it is a pair of factors."""

    def __init__(self, layer: Any, x: Tensor, size: int):
        self.size = size
        self.up: Any = None
        self.latent: Tensor | None = None
        if type(layer) in (LowRankLinear, SharedLowRankLinear) and unwatched(layer) and is_plain(layer.up):
            self.latent, self.up = layer.down(x), layer.up
        else:
            self.whole = layer(x)

    def heads(self, span: slice) -> Tensor:
        """[batch, heads, tokens, size]."""
        columns = slice(span.start * self.size, span.stop * self.size)
        if self.latent is None:
            part = self.whole[..., columns]
        else:
            bias = self.up.bias
            part = F.linear(self.latent, self.up.weight[columns], None if bias is None else bias[columns])
        return part.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def factor(self, g: int) -> tuple[Tensor, Tensor | None]:
        """([1, k, size], [1, size]) of head g."""
        columns = slice(g * self.size, (g + 1) * self.size)
        bias = self.up.bias
        return self.up.weight[columns].mT.contiguous()[None], None if bias is None else bias[columns][None]


def _rotated(x: Tensor, rope: Any) -> Tensor:
    if rope is None:
        return x
    cos, sin = rope[0][:, None], rope[1][:, None]
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def _padding(mask: Tensor | None, causal: bool) -> Tensor | None:
    """[batch, tokens] of a mask that hides padding, and later keys if `causal`; None if it does something else.

    All layers are handed one mask; what it is is noted on it, because looking at it waits for the GPU.
    """
    if mask is None or mask.dtype != torch.bool or mask.shape[-1] != mask.shape[-2]:
        return None
    known = vars(mask).get("_corank_padding")
    if known is None or known[0] != causal:
        pad = mask[:, 0, -1]
        expected = pad[:, None, None, :].expand_as(mask)
        expected = expected.tril() if causal else expected
        known = vars(mask)["_corank_padding"] = (causal, pad if bool((mask == expected).all()) else None)
    return known[1]


def latent_attentions(model: nn.Module, kernel: bool = False, least: int | None = None) -> list[Override]:
    """The overrides for every attention module with factors that can be computed by groups; not yet in place."""
    found: list[Override] = []
    for module in model.modules():
        plan = plan_of(module)
        if plan is None or any(p.is_meta for p in module.parameters()):
            continue
        override = LatentAttention(module, plan, kernel, least)
        if confirmed(override):
            override.caches = plan.rotary and hasattr(module, "layer_idx") and confirmed(override, cached=True)
            found.append(override)
        else:
            note(f"{type(module).__name__} computes more than attention; it runs whole")
    return found


def plan_of(module: Any) -> Plan | None:
    """What the children of a module say; None if it is no attention with factors."""
    roles = {role_of(name): name for name, child in module.named_children() if is_linear(child)}
    size = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    if not {"q", "k", "v"} <= set(roles) or not isinstance(size, int) or not hasattr(module, "scaling"):
        return None
    layers = {role: getattr(module, roles[role]) for role in ("q", "k", "v")}
    if not any(isinstance(layer, FactorizedLinear) for layer in layers.values()) or not hasattr(module, "config"):
        return None
    (out, _), (key_out, _), (value_out, _) = (shape_of(layers[role]) for role in ("q", "k", "v"))
    if out % size or key_out % size or value_out != key_out or out % key_out:
        return None
    code: Any = getattr(type(module).forward, "__wrapped__", type(module).forward)
    rotary = "position_embeddings" in code.__code__.co_varnames[: code.__code__.co_argcount]
    return Plan(roles["q"], roles["k"], roles["v"], roles.get("o"), size, out // size, key_out // size, rotary)


def confirmed(override: LatentAttention, cached: bool = False) -> bool:
    """Whether groups of heads give what the module gives on random inputs, with a mask and without.

    Args:
        override: not in place.
        cached: whether that is so while a cache is filled.
    """
    from transformers import DynamicCache

    module, plan = override.module, override.plan
    like = next(p for p in module.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    tokens = 5
    x = torch.randn(2, tokens, shape_of(getattr(module, plan.q))[1], generator=generator).to(like.device, like.dtype)
    angles = torch.arange(tokens)[None, :, None] * torch.rand(plan.size // 2, generator=generator)
    angles = torch.cat([angles, angles], dim=-1).to(like.device)
    rope = (angles.cos().to(like.dtype), angles.sin().to(like.dtype)) if plan.rotary else None
    seen = torch.ones(2, 1, tokens, tokens, dtype=torch.bool, device=like.device).tril()
    seen[1, :, 2:, 0] = False
    hidden = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    hidden = hidden.masked_fill(~seen, torch.finfo(like.dtype).min)
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            for mask in (hidden, None):
                call: dict[str, Any] = {"attention_mask": mask}
                if plan.rotary:
                    call["position_embeddings"] = rope
                if override._read((), call) is None:
                    continue
                caches = [DynamicCache(), DynamicCache()] if cached else [None, None]
                due = {**call, **({"past_key_values": caches[0]} if cached else {})}
                expected, actual = override.original(x, **due)[0], override.attend(x, rope, mask, caches[1])
                limit = 16 * torch.finfo(x.dtype).eps * expected.float().abs().max()
                if expected.shape != actual.shape or not bool((expected - actual).float().abs().max() <= limit):
                    return False
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False
    finally:
        for m, mode in modes.items():
            m.training = mode
    return True
