"""Random arguments of each operation, and comparison with its plain form in double precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-12}


def wide(value: Any) -> Any:
    """The same argument in double precision."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(op, twin, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Tensor:
    """The result of `op`, after comparing it with the plain form in double precision."""
    kwargs = kwargs or {}
    actual = op(*args, **kwargs)
    expected = twin(*map(wide, args), **kwargs)
    assert actual.shape == expected.shape and torch.isfinite(actual).all()
    if expected.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error <= TOLERANCE[actual.dtype], float(error)
    return actual


class Random:
    """Random tensors of one dtype from one seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=self.generator)).to(self.dtype)


def linear_case(T: int, n: int, k: int, m: int, dtype=torch.float32, bias: bool = True) -> tuple[Any, ...]:
    R = Random(dtype)
    return R(T, n), R(k, n, scale=n**-0.5), R(m, k, scale=max(k, 1) ** -0.5), R(m) if bias else None


def pivot_case(T: int, n: int, k: int, m: int, dtype=torch.float32, bias: bool = True) -> tuple[Any, ...]:
    R = Random(dtype)
    order = torch.randperm(m, generator=R.generator)
    pivots, others = order[:k].sort().values.int(), order[k:].sort().values.int()
    return R(T, n), R(k, n, scale=n**-0.5), R(m - k, k), pivots, others, R(m) if bias else None


def mlp_case(
    T: int, n: int, D: int, ranks: tuple[int, int, int], dtype=torch.float32, bias: bool = True, gated: bool = True
) -> tuple[Any, ...]:
    R, (rg, ru, rd) = Random(dtype), ranks
    x, A = R(T, n), R(rg + (ru if gated else 0), n, scale=n**-0.5)
    Bg, Bu = R(D, rg, scale=max(rg, 1) ** -0.5), R(D, ru, scale=max(ru, 1) ** -0.5) if gated else None
    biases = (R(D), R(D) if gated else None, R(n)) if bias else (None, None, None)
    return x, A, Bg, Bu, R(rd, D, scale=D**-0.5), R(n, rd, scale=max(rd, 1) ** -0.5), *biases


def ups_case(T: int, sizes: tuple[int, ...], ranks: tuple[int, ...], dtype=torch.float32, bias: bool = True):
    R = Random(dtype)
    weights = [R(m, r, scale=max(r, 1) ** -0.5) for m, r in zip(sizes, ranks, strict=True)]
    offsets = [sum(ranks[:i]) for i in range(len(ranks))]
    return R(T, sum(ranks)), weights, [R(m) if bias else None for m in sizes], offsets


def attention_case(
    B: int,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    ranks: tuple[int, int],
    sizes: tuple[int, int],
    dtype=torch.float32,
    rope: bool = False,
    bias: bool = False,
    pad: str | None = None,
    own: bool = False,
) -> tuple[Any, ...]:
    """heads: (query, key); lengths: (queries, keys); ranks and sizes: (of keys, of values)."""
    R, (H, KV), (TQ, T), (rk, rv), (dh, dv) = Random(dtype), heads, lengths, ranks, sizes
    latent = KV if own else 1
    cos = sin = mask = None
    if rope:
        angles = 6 * torch.rand(B, T, dh // 2, generator=R.generator)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if pad is not None:
        mask = torch.ones(B, T, dtype=torch.bool)
        if pad == "left":
            mask[0, : T // 2] = 0
            mask[-1, : T - 1] = 0
        elif pad == "right":
            mask[0, T // 2 :] = 0
        else:
            mask[0] = 0
    biases = (R(KV, dh), R(KV, dv)) if bias else (None, None)
    return (
        R(B, H, TQ, dh),
        R(B, latent, T, rk),
        R(B, latent, T, rv),
        R(KV, rk, dh, scale=max(rk, 1) ** -0.5),
        R(KV, rv, dv, scale=max(rv, 1) ** -0.5),
        *biases,
        cos,
        sin,
        mask,
    )
