"""Matrices and textbook formulas the tests compare with. Everything is float64 and as direct as possible."""

from __future__ import annotations

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int, tokens: int, seed: int = 0, decay: float = 0.5) -> Tensor:
    """Correlated inputs X [n, tokens] / sqrt(tokens), decaying spectrum, one loud channel; G = X X^T."""
    mix = torch.linalg.qr(randn(n, n, seed=seed + 100)).Q
    scale = torch.arange(1, n + 1, dtype=torch.float64) ** -decay
    X = mix @ (scale[:, None] * randn(n, tokens, seed=seed + 200))
    X[n // 2] *= 5.0
    return X / tokens**0.5


def decaying(m: int, n: int, rate: float = 1.0, seed: int = 0) -> Tensor:
    """A matrix with singular values i^-rate."""
    p = min(m, n)
    U = torch.linalg.qr(randn(m, p, seed=seed + 1)).Q
    V = torch.linalg.qr(randn(n, p, seed=seed + 2)).Q
    return U * torch.arange(1, p + 1, dtype=torch.float64) ** -rate @ V.T


def loss(W: Tensor, approximation: Tensor, G: Tensor | None = None, R: Tensor | None = None) -> float:
    """|| L (W - W') S ||_F^2 = tr(R D G D^T), metrics full, diagonal or None."""
    D = W - approximation
    DG = D if G is None else D * G if G.ndim == 1 else D @ G
    RD = D if R is None else R[:, None] * D if R.ndim == 1 else R @ D
    return float((RD * DG).sum())


def best(N: Tensor, k: int) -> Tensor:
    """The best rank-k approximation of N."""
    U, s, Vh = torch.linalg.svd(N, full_matrices=False)
    return U[:, :k] * s[:k] @ Vh[:k]
