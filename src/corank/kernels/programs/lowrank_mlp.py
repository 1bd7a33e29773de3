"""The middle of a factorized MLP: second factors of gate and up, activation, first factor of down, in one launch.

The wide activation [tokens, intermediate] is never written: a block owns a range of the intermediate size and the whole
rank of `down`, so nothing is computed twice; the blocks' parts are summed in a fixed order by the one that arrives last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corank.kernels.launching import interpreted, power, processors, with_tiles

ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}


@triton.jit
def activate(h, ACT: tl.constexpr):
    """The activation of h in fp32, by its number in `ACTS`."""
    if ACT == 0:
        h = h * tl.sigmoid(h)
    elif ACT == 1:
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACT == 2:
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACT == 3:
        h = tl.maximum(h, 0.0)
    else:
        h = tl.maximum(h, 0.0)
        h = h * h
    return h


@triton.jit
def half_product(
    z_ptr, b_ptr, bias_ptr, t, d, T, D, R, z_stride, b_stride,
    BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z B^T (+ bias) [BT, BD] for rows t of z and rows d of B."""
    acc = tl.zeros((BT, BD), tl.float32)
    for block in range(tl.cdiv(R, BR)):
        r = block * BR + tl.arange(0, BR)
        z = tl.load(
            z_ptr + t[:, None].to(tl.int64) * z_stride + r[None, :], mask=(t < T)[:, None] & (r < R)[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + d[None, :].to(tl.int64) * b_stride + r[:, None], mask=(d < D)[None, :] & (r < R)[:, None], other=0.0
        )
        if UPCAST:
            z, b = z.to(tl.float32), b.to(tl.float32)
        acc += tl.dot(z, b, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def middle_program(
    z_ptr, bg_ptr, bu_ptr, ad_ptr, gate_bias_ptr, up_bias_ptr, s_ptr, ws_ptr, count_ptr,
    T, D, RG, RU, RD, z_stride, bg_stride, bu_stride, ad_stride,
    PARTS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BRD: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """s [T, RD] = (act(z[:, :RG] Bg^T + bg) * (z[:, RG:] Bu^T + bu)) Ad^T."""
    part, tile = tl.program_id(0), tl.program_id(1)
    t = tile * BT + tl.arange(0, BT)
    rd = tl.arange(0, BRD)
    total = tl.zeros((BT, BRD), tl.float32)
    for block in range(part, tl.cdiv(D, BD), PARTS):
        d = block * BD + tl.arange(0, BD)
        h = half_product(
            z_ptr, bg_ptr, gate_bias_ptr, t, d, T, D, RG, z_stride, bg_stride, BT, BD, BR, GATE_BIAS, UPCAST
        )
        h = activate(h, ACT)
        if GATED:
            h *= half_product(
                z_ptr + RG, bu_ptr, up_bias_ptr, t, d, T, D, RU, z_stride, bu_stride, BT, BD, BR, UP_BIAS, UPCAST
            )
        a = tl.load(
            ad_ptr + rd[None, :].to(tl.int64) * ad_stride + d[:, None],
            mask=(rd < RD)[None, :] & (d < D)[:, None],
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
        # columns beyond D: act(0 + bias) may be anything, but their rows of `a` are zero
        total += tl.dot(h.to(a.dtype), a, input_precision="ieee")
    inside = (t < T)[:, None] & (rd < RD)[None, :]
    here = t[:, None].to(tl.int64) * RD + rd[None, :]
    last = PARTS == 1
    if PARTS > 1:
        tl.store(ws_ptr + part.to(tl.int64) * T * RD + here, total, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == PARTS - 1
    if last:
        if PARTS > 1:
            total = tl.zeros((BT, BRD), tl.float32)
            for g in range(PARTS):
                offset = tl.full((), g, tl.int64) * T * RD
                total += tl.load(ws_ptr + offset + here, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(s_ptr + here, total.to(s_ptr.dtype.element_ty), mask=inside)


def launch(
    z: Tensor, Bg: Tensor, Bu: Tensor | None, Ad: Tensor, bg: Tensor | None, bu: Tensor | None, act: str
) -> Tensor | None:
    """s [T, rd] for z [T, rg + ru] (or [T, rg]), Bg [D, rg], Bu [D, ru], Ad [rd, D], biases [D].

    Returns:
        None if no tiles fit.
    """
    T, (D, RG), RD = z.shape[0], Bg.shape, Ad.shape[0]
    RU = 0 if Bu is None else Bu.shape[1]
    BRD = power(RD)
    # BT * BRD sums are held in registers
    widest = max(16, min(64, 32768 // BRD))
    BT = min(power(T), widest)
    s = z.new_empty(T, RD)

    def run(tiles: tuple[int, int, int]) -> Tensor:
        BD, BR, warps = tiles
        rows = triton.cdiv(T, BT)
        parts = max(1, min(triton.cdiv(D, BD), 2 * processors(z) // rows))
        ws = torch.empty(parts * T * RD if parts > 1 else 1, dtype=torch.float32, device=z.device)
        count = torch.zeros(rows if parts > 1 else 1, dtype=torch.int32, device=z.device)
        middle_program[(parts, rows)](
            z, Bg, z if Bu is None else Bu, Ad, z if bg is None else bg, z if bu is None else bu, s, ws, count,
            T, D, RG, RU, RD, z.stride(0), Bg.stride(0), 0 if Bu is None else Bu.stride(0), Ad.stride(0),
            PARTS=parts, BT=BT, BD=BD, BR=BR, BRD=BRD, ACT=ACTS[act], GATED=Bu is not None,
            GATE_BIAS=bg is not None, UP_BIAS=bu is not None, UPCAST=interpreted(), num_warps=warps, num_stages=2,
        )  # fmt: skip
        return s

    tiles = [(32, 32, 4)] if interpreted() else [(64, 64, 8), (32, 64, 8), (32, 32, 4), (16, 16, 4)]
    return with_tiles(("lowrank_mlp", z.device.index, z.dtype, BT, BRD), tiles, run)
