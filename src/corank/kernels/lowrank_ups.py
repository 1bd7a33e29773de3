"""The second factors of layers with one input, y_i = B_i z_i + b_i, in one launch whatever their sizes."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from corank.kernels.launching import unsuitable
from corank.kernels.lowrank_linear import MOST


def lowrank_ups_twin(z: Tensor, weights: list[Tensor], biases: list[Tensor | None], offsets: list[int]) -> list[Tensor]:
    """The same in plain torch; arguments as for `lowrank_ups`."""
    parts = zip(weights, biases, offsets, strict=True)
    return [F.linear(z[..., at : at + B.shape[1]], B, bias) for B, bias, at in parts]


def supports_lowrank_ups(
    z: Tensor, weights: list[Tensor], biases: list[Tensor | None], offsets: list[int]
) -> str | None:
    """Why the kernel cannot or should not run; None if it can."""
    tokens = z.numel() // z.shape[-1] if z.shape[-1] else 0
    if not 2 <= len(weights) <= 3:
        return "there are not two or three layers"
    if tokens > MOST:
        return f"more than {MOST} tokens, for which the library's products are faster"
    if tokens == 0 or any(B.numel() == 0 for B in weights):
        return "there is nothing to multiply"
    sizes = itertools.chain(offsets, (z.shape[-1],), *(B.shape for B in weights))
    return unsuitable(z, *weights, *biases, sizes=sizes)


@torch.library.custom_op("corank::lowrank_ups", mutates_args=())
def lowrank_ups(z: Tensor, weights: list[Tensor], biases: list[Tensor | None], offsets: list[int]) -> list[Tensor]:
    """y_i = B_i z[offset_i : offset_i + r_i] + b_i. Without gradients: it is for decoding.

    Args:
        z: [..., k], the latents.
        weights: B_i [m_i, r_i].
        biases: [m_i] or None for each.
        offsets: where the latents of each begin.

    Returns:
        [..., m_i] for each.
    """
    if supports_lowrank_ups(z, weights, biases, offsets) is None:
        from corank.kernels.programs.lowrank_linear import launch_ups

        rows = z.reshape(-1, z.shape[-1])
        ys = launch_ups(rows if rows.stride(1) == 1 else rows.contiguous(), weights, biases, offsets)
        if ys is not None:
            return [y.view(*z.shape[:-1], -1) for y in ys]
    return lowrank_ups_twin(z, weights, biases, offsets)


@lowrank_ups.register_fake
def _(z: Tensor, weights: list[Tensor], biases: list[Tensor | None], offsets: list[int]) -> list[Tensor]:
    return [z.new_empty(*z.shape[:-1], B.shape[0]) for B in weights]
