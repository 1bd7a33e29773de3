"""Fewer dimensions in every head: queries and keys by selection, values and outputs by a change of basis.

Queries and keys: rotary embeddings turn dimensions i and i + h / 2 of a head together, so these pairs are what can be left
out. The score of a pair is the energy of the queries times that of the keys in it, summed over the query heads that read a
key-value head; it does not depend on the position. (One dimension alone: sqrt(E[q_i^2] E[k_i^2]), which is the column-row
score ||C_Q^{1/2}[:, i]|| ||C_K^{1/2}[:, i]||.)

Values and outputs: a key-value head computes v = W_V x, which g query heads read as W_O,a v. With C_v = E[v v^T] and
M = sum_a W_O,a^T W_O,a the best r dimensions are, with C_v = R R^T and R^T M R = Q S^2 Q^T,

    W_V' = Q_r^T R^+ W_V,    W_O,a' = W_O,a R Q_r,    loss sum_a E||W_O,a v - W_O,a' v'||^2 = sum of the discarded S^2

This is the two-sided decomposition of MoDeGPT (arXiv:2408.09632) for all heads of a group at once, in matrices of the
size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corank.linalg.roots import psd_root
from corank.structured.moments import Moments


def output_energy(W: Tensor, bias: Tensor | None, inputs: Moments) -> Tensor:
    """E[y_i^2] [m] of y = W x + b, from the second moment of x."""
    W = W.double()
    energy = ((W @ inputs.second) * W).sum(1)
    if bias is not None:
        b = bias.double()
        energy = energy + b * (2 * (W @ inputs.mean) + b)
    return energy.clamp_min(0)


def pair_scores(query_energy: Tensor, key_energy: Tensor, h: int) -> Tensor:
    """Scores of rotary pairs.

    Args:
        query_energy: E[q^2] [n_kv * g * h].
        key_energy: E[k^2] [n_kv * h].
        h: dimensions of a head.

    Returns:
        float64 [n_kv, h / 2], squared: energy of the group's queries times energy of the keys.
    """
    keys = key_energy.double().view(-1, 2, h // 2).sum(1)
    queries = query_energy.double().view(len(keys), -1, 2, h // 2).sum((1, 2))
    return queries * keys


def pair_rows(pairs: Tensor, heads: int, h: int) -> Tensor:
    """Rows of a projection [heads * h, d] that belong to pairs, in the order of a smaller head: int64 [heads * 2 * pairs]."""
    inside = torch.cat([pairs, pairs + h // 2])
    return (torch.arange(heads, device=pairs.device)[:, None] * h + inside).flatten()


def value_output(W_O: Tensor, C_v: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder and decoder of the values of one key-value head.

    Args:
        W_O: the columns that read it, of its g query heads on top of each other: [g * d, h].
        C_v: E[v v^T] [h, h].
        r: dimensions that stay.

    Returns:
        E [r, h] and B [h, r] with v' = E v and W_O' = W_O B, and all S^2 [h], descending; rows and columns beyond the rank
        of C_v are zero.
    """
    h, W_O = len(C_v), W_O.double()
    R = psd_root(C_v.double())
    S2, Q = torch.linalg.eigh(R.T @ (W_O.T @ W_O) @ R)
    S2, Q = S2.flip(0).clamp_min(0), Q.flip(1)[:, :r]
    E, B = Q.new_zeros(r, h), Q.new_zeros(h, r)
    # the columns of R are orthogonal, R^T R = diag of their squared norms: R^+ needs no decomposition
    E[: Q.shape[1]] = Q.T @ (R.T / R.square().sum(0)[:, None])
    B[:, : Q.shape[1]] = R @ Q
    return E, B, torch.cat([S2, S2.new_zeros(h - len(S2))])
