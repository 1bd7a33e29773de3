"""Attention from the latents of keys and values: a tile of K and V is rebuilt where it is used and never stored.

The query heads that share a key head are stacked as rows of one block, so that a tile is rebuilt once for all of them.
The running maximum starts at a finite number and masked scores are zeroed again after the exponential, so a row that may
see nothing gives zeros, wherever its masked keys lie.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from corank.kernels.launching import interpreted, power, with_tiles


@triton.jit
def rebuilt(
    p_ptr, v_ptr, bias_ptr, n, c, T, R, columns, p_stride, v_stride,
    BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P[n] V[:, c] (+ bias[c]) in fp32: rows n < T, columns c where `columns`."""
    acc = tl.zeros((BN, BC), tl.float32)
    for block in range(tl.cdiv(R, BR)):
        r = block * BR + tl.arange(0, BR)
        p = tl.load(
            p_ptr + n[:, None].to(tl.int64) * p_stride + r[None, :], mask=(n < T)[:, None] & (r < R)[None, :], other=0.0
        )
        v = tl.load(v_ptr + r[:, None] * v_stride + c[None, :], mask=(r < R)[:, None] & columns[None, :], other=0.0)
        if UPCAST:
            p, v = p.to(tl.float32), v.to(tl.float32)
        acc += tl.dot(p, v, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + c, mask=columns, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def attention_program(
    q_ptr, pk_ptr, pv_ptr, vk_ptr, vv_ptr, bk_ptr, bv_ptr, cos_ptr, sin_ptr, pad_ptr, o_ptr,
    TQ, T, RK, RV, DH, HALF, DV, KV_HEADS, scale, q_offset, window,
    q_b, q_h, q_t, o_b, o_h, o_t, pk_b, pk_h, pk_t, pv_b, pv_h, pv_t, vk_h, vk_r, vv_h, vv_r, rope_b, rope_t, pad_b,
    GROUP: tl.constexpr, BG: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    BH: tl.constexpr, BV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROPE: tl.constexpr, PAD: tl.constexpr,
    K_BIAS: tl.constexpr, V_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of queries of all heads that share one key head."""
    tile = tl.program_id(0)
    b, kv = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    row = tl.arange(0, BQ * BG)
    t, g = tile * BQ + row // BG, row % BG
    rows = (t < TQ) & (g < GROUP)
    i, j = tl.arange(0, BH), tl.arange(0, BV)
    first, second = i < HALF, HALF + i < DH
    q = q_ptr + b.to(tl.int64) * q_b + (kv * GROUP + g[:, None]).to(tl.int64) * q_h + t[:, None].to(tl.int64) * q_t
    q1 = tl.load(q + i[None, :], mask=rows[:, None] & first[None, :], other=0.0)
    q2 = tl.load(q + HALF + i[None, :], mask=rows[:, None] & second[None, :], other=0.0)
    if UPCAST:
        q1, q2 = q1.to(tl.float32), q2.to(tl.float32)
    pk_ptr += b.to(tl.int64) * pk_b + kv.to(tl.int64) * pk_h
    pv_ptr += b.to(tl.int64) * pv_b + kv.to(tl.int64) * pv_h
    vk_ptr += kv * vk_h
    vv_ptr += kv * vv_h
    m = tl.full((BQ * BG,), -1e30, tl.float32)
    l = tl.zeros((BQ * BG,), tl.float32)
    acc = tl.zeros((BQ * BG, BV), tl.float32)
    position = q_offset + t
    begin, end = 0, T
    if CAUSAL:
        end = tl.minimum(T, q_offset + (tile + 1) * BQ)
    if WINDOW:
        begin = tl.maximum(0, q_offset + tile * BQ - window + 1) // BN * BN
    for start in range(begin, end, BN):
        n = start + tl.arange(0, BN)
        k1 = rebuilt(pk_ptr, vk_ptr, bk_ptr + kv * DH, n, i, T, RK, first, pk_t, vk_r, BN, BH, BR, K_BIAS, UPCAST)
        k2 = rebuilt(
            pk_ptr, vk_ptr, bk_ptr + kv * DH, n, HALF + i, T, RK, second, pk_t, vk_r, BN, BH, BR, K_BIAS, UPCAST
        )
        if ROPE:
            here = b.to(tl.int64) * rope_b + n[:, None].to(tl.int64) * rope_t + i[None, :]
            inside = (n < T)[:, None] & first[None, :]
            cos = tl.load(cos_ptr + here, mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + here, mask=inside, other=0.0).to(tl.float32)
            k1, k2 = k1 * cos - k2 * sin, k2 * cos + k1 * sin
        s = tl.dot(q1, tl.trans(k1.to(q1.dtype)), input_precision="ieee")
        s += tl.dot(q2, tl.trans(k2.to(q2.dtype)), input_precision="ieee")
        s *= scale
        keep = rows[:, None] & (n < T)[None, :]
        if PAD:
            keep = keep & (tl.load(pad_ptr + b * pad_b + n, mask=n < T, other=0) != 0)[None, :]
        if CAUSAL:
            keep = keep & (n[None, :] <= position[:, None])
        if WINDOW:
            keep = keep & (n[None, :] > position[:, None] - window)
        s = tl.where(keep, s, -1e30)
        larger = tl.maximum(m, tl.max(s, 1))
        p = tl.where(keep, tl.exp(s - larger[:, None]), 0.0)
        shrink = tl.exp(m - larger)
        l = l * shrink + tl.sum(p, 1)
        v = rebuilt(pv_ptr, vv_ptr, bv_ptr + kv * DV, n, j, T, RV, j < DV, pv_t, vv_r, BN, BV, BR, V_BIAS, UPCAST)
        v = v.to(q1.dtype)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = larger
    acc = acc / tl.where(l > 0, l, 1.0)[:, None]
    o = o_ptr + b.to(tl.int64) * o_b + (kv * GROUP + g[:, None]).to(tl.int64) * o_h + t[:, None].to(tl.int64) * o_t
    tl.store(o + j[None, :], acc.to(o_ptr.dtype.element_ty), mask=rows[:, None] & (j < DV)[None, :])


def launch(
    q: Tensor,
    pk: Tensor,
    pv: Tensor,
    Vk: Tensor,
    Vv: Tensor,
    bk: Tensor | None,
    bv: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    pad: Tensor | None,
    causal: bool,
    scale: float,
    q_offset: int,
    window: int,
) -> Tensor | None:
    """As `corank.kernels.latent_attention`; pk [B, Hkv or 1, T, rk], pv alike, cos and sin [B or 1, T, dh / 2].

    Returns:
        None if no tiles fit.
    """
    B, H, TQ, DH = q.shape
    KV, RK, T, RV, DV = Vk.shape[0], Vk.shape[1], pk.shape[2], Vv.shape[1], Vv.shape[2]
    group, half = H // KV, (DH + 1) // 2
    BG = power(group, 1)
    o = q.new_empty(B, H, TQ, DV)
    nothing = q

    def spread(p: Tensor) -> tuple[int, int, int]:
        return p.stride(0), p.stride(1) if p.shape[1] > 1 else 0, p.stride(2)

    def run(tiles: tuple[int, int, int, int]) -> Tensor:
        rows, BN, BR, warps = tiles
        BQ = max(1, rows // BG)
        attention_program[(triton.cdiv(TQ, BQ), B * KV)](
            q, pk, pv, Vk, Vv, *(nothing if t is None else t for t in (bk, bv, cos, sin, pad)), o,
            TQ, T, RK, RV, DH, half, DV, KV, scale, q_offset, window,
            *q.stride()[:3], *o.stride()[:3], *spread(pk), *spread(pv),
            Vk.stride(0), Vk.stride(1), Vv.stride(0), Vv.stride(1),
            *((0, 0) if cos is None else (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))),
            0 if pad is None else pad.stride(0),
            GROUP=group, BG=BG, BQ=BQ, BN=BN, BR=BR, BH=power(half), BV=power(DV),
            CAUSAL=causal, WINDOW=window > 0, ROPE=cos is not None, PAD=pad is not None,
            K_BIAS=bk is not None, V_BIAS=bv is not None, UPCAST=interpreted(), num_warps=warps, num_stages=2,
        )  # fmt: skip
        return o

    tiles = (
        [(16, 16, 32, 4)] if interpreted() else [(128, 64, 64, 8), (64, 64, 32, 4), (32, 32, 32, 4), (16, 16, 16, 4)]
    )
    tiles = [(max(rows, BG), BN, BR, warps) for rows, BN, BR, warps in tiles]
    return with_tiles(("latent_attention", q.device.index, q.dtype, DH, DV, BG), tiles, run)
