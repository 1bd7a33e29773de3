"""The linear maps that adapters add to a layer, as functions of what trains.

All are linear in the trained values, and zero at zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear


def between(x: Tensor, C: Tensor, M: Tensor, R: Tensor) -> Tensor:
    """C M R x without multiplying the three matrices out.

    Args:
        x: [..., n].
        C: [m, r], of any dtype; the first and the last product are taken in it.
        M: [q, p].
        R: [p, n].

    Returns:
        [..., m] in the dtype of C.
    """
    z = linear(x.to(R.dtype), R).to(M.dtype)
    return linear(linear(z, M).to(C.dtype), C)


def convolved(core: Tensor, position: int) -> Tensor:
    """What stands between all columns and all rows of a stack for one of its slices.

    The product of tensors T = C * M * R over circular convolution is T_s = sum_(a+b+c = s mod S) C_a M_b R_c, which is
    [C_0 ... C_(S-1)] K_s [R_0; ...; R_(S-1)] with the blocks (K_s)_(a,c) = M_(s-a-c mod S).

    Args:
        core: M [S, r, r].
        position: s.

    Returns:
        K_s [S r, S r].
    """
    S, r, _ = core.shape
    number = torch.arange(S, device=core.device)
    blocks = core[(position - number[:, None] - number) % S]  # [a, c, r, r]
    return blocks.permute(0, 2, 1, 3).reshape(S * r, S * r)


def rotation_rank(m: int, n: int, rank: int) -> int:
    """Side of MoRA's square matrix with at most about the parameters of a LoRA: even, and at least 2."""
    return max(int(math.sqrt((m + n) * rank) + 0.5) // 2 * 2, 2)


def rotated(x: Tensor, M: Tensor, m: int) -> Tensor:
    """MoRA's map (arXiv:2405.12130, type 6): pieces of x, rotated by their number, times M, one after the other.

    Args:
        x: [..., n].
        M: [r, r], r even.
        m: size of the output.

    Returns:
        [..., m] in the dtype of M.
    """
    n, r = x.shape[-1], len(M)
    pieces = -(-n // r)
    wrapped = torch.arange(pieces * r, device=x.device) % n
    z = x.to(M.dtype).index_select(-1, wrapped).unflatten(-1, (pieces, r))
    frequencies = 10000.0 ** (-torch.arange(0, r, 2, device=x.device, dtype=torch.float64) / r)
    angles = torch.outer(torch.arange(pieces, device=x.device, dtype=torch.float64), frequencies).repeat(1, 2)
    turned = torch.cat([-z[..., r // 2 :], z[..., : r // 2]], -1)
    y = linear(z * angles.cos().to(M.dtype) + turned * angles.sin().to(M.dtype), M).flatten(-2)
    return y.index_select(-1, torch.arange(m, device=x.device) % (pieces * r))
