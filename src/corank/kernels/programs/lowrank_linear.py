"""y = B (A x) for few tokens: two launches, each at the speed at which its weights are read.

Tokens are the narrow side of every product and weights the wide one. The first launch splits the long inner size over
blocks, so that a narrow A still occupies the whole GPU; the block that arrives last sums the parts in a fixed order,
which makes the result reproducible.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from corank.kernels.launching import interpreted, power, processors, with_tiles


@triton.jit
def down_program(
    x_ptr, a_ptr, p_ptr, ws_ptr, count_ptr, y_ptr, pivot_ptr, bias_ptr,
    T, R, N, x_stride, a_stride, y_stride,
    SPLIT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    PIVOTS: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """p [T, R] = x A^T; with PIVOTS also y[:, pivot] = p (+ bias[pivot])."""
    tile, part = tl.program_id(0), tl.program_id(1)
    r = tile * BR + tl.arange(0, BR)
    t = tl.arange(0, BT)
    acc = tl.zeros((BR, BT), tl.float32)
    for block in range(part, tl.cdiv(N, BN), SPLIT):
        n = block * BN + tl.arange(0, BN)
        a = tl.load(
            a_ptr + r[:, None].to(tl.int64) * a_stride + n[None, :], mask=(r < R)[:, None] & (n < N)[None, :], other=0.0
        )
        x = tl.load(
            x_ptr + t[None, :].to(tl.int64) * x_stride + n[:, None], mask=(t < T)[None, :] & (n < N)[:, None], other=0.0
        )
        if UPCAST:
            a, x = a.to(tl.float32), x.to(tl.float32)
        acc += tl.dot(a, x, input_precision="ieee")
    inside = (r < R)[:, None] & (t < T)[None, :]
    here = t[None, :] * R + r[:, None]
    last = SPLIT == 1
    if SPLIT > 1:
        tl.store(ws_ptr + part * T * R + here, acc, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            acc = tl.zeros((BR, BT), tl.float32)
            for s in range(SPLIT):
                acc += tl.load(ws_ptr + s * T * R + here, mask=inside, other=0.0, cache_modifier=".cg")
        value = acc.to(p_ptr.dtype.element_ty)
        tl.store(p_ptr + here, value, mask=inside)
        if PIVOTS:
            pivot = tl.load(pivot_ptr + r, mask=r < R, other=0)
            if BIAS:
                b = tl.load(bias_ptr + pivot, mask=r < R, other=0.0).to(tl.float32)
                value = (value.to(tl.float32) + b[:, None]).to(p_ptr.dtype.element_ty)
            tl.store(y_ptr + t[None, :].to(tl.int64) * y_stride + pivot[:, None], value, mask=inside)


@triton.jit
def up_tile(
    tile, p_ptr, b_ptr, bias_ptr, y_ptr, index_ptr,
    T, R, M, p_stride, b_stride, y_stride,
    BM: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
    BIAS: tl.constexpr, SCATTER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Columns tile * BM and following of y [T, M] = p B^T (+ bias); with SCATTER column j goes to y[:, index[j]]."""
    m = tile * BM + tl.arange(0, BM)
    t = tl.arange(0, BT)
    acc = tl.zeros((BM, BT), tl.float32)
    for block in range(tl.cdiv(R, BR)):
        r = block * BR + tl.arange(0, BR)
        b = tl.load(
            b_ptr + m[:, None].to(tl.int64) * b_stride + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0
        )
        p = tl.load(
            p_ptr + t[None, :].to(tl.int64) * p_stride + r[:, None], mask=(t < T)[None, :] & (r < R)[:, None], other=0.0
        )
        if UPCAST:
            b, p = b.to(tl.float32), p.to(tl.float32)
        acc += tl.dot(b, p, input_precision="ieee")
    place = m
    if SCATTER:
        place = tl.load(index_ptr + m, mask=m < M, other=0)
    if BIAS:
        acc += tl.load(bias_ptr + place, mask=m < M, other=0.0).to(tl.float32)[:, None]
    y = y_ptr + t[None, :].to(tl.int64) * y_stride + place[:, None]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (t < T)[None, :])


@triton.jit
def up_program(
    p_ptr, b_ptr, bias_ptr, y_ptr, index_ptr,
    T, R, M, b_stride, y_stride,
    BM: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
    BIAS: tl.constexpr, SCATTER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y [T, M] = p B^T (+ bias), see `up_tile`."""
    up_tile(
        tl.program_id(0), p_ptr, b_ptr, bias_ptr, y_ptr, index_ptr,
        T, R, M, R, b_stride, y_stride, BM, BR, BT, BIAS, SCATTER, UPCAST,
    )  # fmt: skip


@triton.jit
def ups_program(
    z_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, y0_ptr, y1_ptr, y2_ptr,
    T, R0, R1, R2, M0, M1, M2, at0, at1, at2, z_stride, b0_stride, b1_stride, b2_stride,
    BM: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Up to three products y_i = z[:, at_i : at_i + R_i] B_i^T (+ bias_i) in one launch."""
    tile = tl.program_id(0)
    first, second = tl.cdiv(M0, BM), tl.cdiv(M0, BM) + tl.cdiv(M1, BM)
    if tile < first:
        up_tile(tile, z_ptr + at0, b0_ptr, bias0_ptr, y0_ptr, z_ptr, T, R0, M0, z_stride, b0_stride, M0,
                BM, BR, BT, BIAS0, False, UPCAST)  # fmt: skip
    elif tile < second:
        up_tile(tile - first, z_ptr + at1, b1_ptr, bias1_ptr, y1_ptr, z_ptr, T, R1, M1, z_stride, b1_stride, M1,
                BM, BR, BT, BIAS1, False, UPCAST)  # fmt: skip
    else:
        up_tile(tile - second, z_ptr + at2, b2_ptr, bias2_ptr, y2_ptr, z_ptr, T, R2, M2, z_stride, b2_stride, M2,
                BM, BR, BT, BIAS2, False, UPCAST)  # fmt: skip


def launch_ups(
    z: Tensor, weights: list[Tensor], biases: list[Tensor | None], offsets: list[int]
) -> list[Tensor] | None:
    """[T, m_i] for z [T, k], two or three weights [m_i, r_i] and the columns of z where their latents begin.

    Returns:
        None if no tiles fit.
    """
    T, BT = z.shape[0], power(z.shape[0])
    ys = [z.new_empty(T, B.shape[0]) for B in weights]
    third = [None] * (3 - len(weights))
    B, bias, y = [*weights, *third], [*biases, *third], [*ys, *third]
    at = [*offsets, *(0 for _ in third)]

    def run(tiles: tuple[int, int]) -> list[Tensor]:
        BM, BR = tiles
        grid = sum(triton.cdiv(W.shape[0], BM) for W in weights)
        ups_program[(grid,)](
            z, *(z if t is None else t for t in (*B, *bias, *y)),
            T, *(0 if W is None else W.shape[1] for W in B), *(0 if W is None else W.shape[0] for W in B), *at,
            z.stride(0), *(0 if W is None else W.stride(0) for W in B),
            BM=BM, BR=BR, BT=BT, BIAS0=bias[0] is not None, BIAS1=bias[1] is not None, BIAS2=bias[2] is not None,
            UPCAST=interpreted(), num_warps=4, num_stages=3,
        )  # fmt: skip
        return ys

    tiles = [(32, 32)] if interpreted() else [(64, 128), (64, 64), (32, 64), (16, 32)]
    return with_tiles(("lowrank_ups", z.device.index, z.dtype, BT), tiles, run)


def split_of(tiles: int, blocks: int, device: int) -> int:
    """Parts of the inner size: the smallest power of two that occupies the device twice, at most 16 and `blocks`."""
    split = 1
    while split < 16 and tiles * split < 2 * device and split * 2 <= blocks:
        split *= 2
    return split


def launch(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    pivots: Tensor | None = None,
    others: Tensor | None = None,
) -> Tensor | None:
    """y [T, m] for x [T, n], A [k, n], B [m, k]; with `pivots` [k] and `others` [m - k] of a pivoted layer, B [m - k, k].

    Returns:
        None if no tiles fit.
    """
    (T, N), R, M = x.shape, A.shape[0], B.shape[0]
    out = M + (R if pivots is not None else 0)
    BT = power(T)
    y = x.new_empty(T, out)
    options: dict[str, Any] = {"BIAS": bias is not None, "UPCAST": interpreted()}

    def run(tiles: tuple[int, int, int, int]) -> Tensor:
        BR, BN, BM, BK = tiles
        grid, blocks = triton.cdiv(R, BR), triton.cdiv(N, BN)
        split = split_of(grid, blocks, processors(x))
        p = x.new_empty(T, R)
        ws = torch.empty(split * T * R if split > 1 else 1, dtype=torch.float32, device=x.device)
        count = torch.zeros(grid if split > 1 else 1, dtype=torch.int32, device=x.device)
        nothing = pivots if pivots is not None else count
        down_program[(grid, split)](
            x, A, p, ws, count, y, nothing, x if bias is None else bias,
            T, R, N, x.stride(0), A.stride(0), y.stride(0),
            SPLIT=split, BR=BR, BN=BN, BT=BT, PIVOTS=pivots is not None, num_warps=4, num_stages=3, **options,
        )  # fmt: skip
        if M:
            up_program[(triton.cdiv(M, BM),)](
                p, B, x if bias is None else bias, y, nothing if others is None else others,
                T, R, M, B.stride(0), y.stride(0),
                BM=BM, BR=BK, BT=BT, SCATTER=others is not None, num_warps=4, num_stages=3, **options,
            )  # fmt: skip
        return y

    wide = BT * x.element_size() <= 64
    best = [(64, 256 if wide else 128, 64, 128), (32, 128, 64, 64), (32, 64, 32, 64), (16, 32, 16, 32)]
    tiles = [(32, 32, 32, 32)] if interpreted() else best
    return with_tiles(("lowrank_linear", x.device.index, x.dtype, BT), tiles, run)
