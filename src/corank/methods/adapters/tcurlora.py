"""tCURLoRA: one tensor CUR for all matrices of a shape (He et al., MICCAI 2025, arXiv:2501.02227).

    T [S, m, n]: the matrices of one shape;  F = fft(T) over the S slices;  J = the r columns of largest sum_k ||F_k[:, j]||,
    I = the r rows of largest sum_k ||F_k[i, J]||;   T + Re ifft_k( F_k[:, J] M_k F_k[I] ),   M from zero

Trains: S r^2 values a stack. Needs: nothing. M is kept real, on the slices, where the product is a circular convolution,
W_s + sum_(a+b+c = s mod S) W_a[:, J] M_b W_c[I]: no FFT, no complex numbers, the conjugate symmetry by construction.
Differs from the released script, in which M is never trained (the weights are written once, outside of the graph, and the optimizer
is not given M). Its M starts at the pseudo-inverse of F_k[I, J], from which it subtracts the same again; here it starts
at zero, so that weight decay pulls towards the pre-trained weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corank.adaptation import Adaptation, adapter


def slice_norms(slices: Sequence[Tensor], dim: int, panel: int = 256) -> Tensor:
    """sum_k || F_k[:, j] ||_2 [n] (dim=0; rows: dim=1), float64, F the transform over the slices [m, n]; in panels."""
    parts = []
    for start in range(0, slices[0].shape[1 - dim], panel):
        stack = torch.stack([W.narrow(1 - dim, start, min(panel, W.shape[1 - dim] - start)) for W in slices])
        parts.append(torch.fft.fft(stack.double(), dim=0).abs().square().sum(1 + dim).sqrt().sum(0))
    return torch.cat(parts)


@adapter("tcurlora", cite="arXiv:2501.02227")
def tcurlora(rank: int = 1, grouping: str = "shape") -> Adaptation:
    """Link tensor between the strongest columns and rows of a stack of matrices.

    Args:
        rank: r, columns and rows of each slice.
        grouping: what makes a stack: "shape", all matrices of one shape (the paper), or "role", of these those of one
            role (q of all layers, ...).
    """

    def choose(slices: Sequence[Tensor], r: int) -> tuple[Tensor, Tensor]:
        J = torch.sort(slice_norms(slices, 0), descending=True, stable=True).indices[:r]
        rows = slice_norms([W[:, J] for W in slices], 1)
        return torch.sort(rows, descending=True, stable=True).indices[:r], J

    return Adaptation("stack", rank, choose, grouping=grouping)
