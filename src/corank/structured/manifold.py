"""How alike the hidden states of two layers are, after both have been laid out in a plane (for `mka`)."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 5
"""Of the estimate of mutual information."""
WIDE = 50
"""Neighbours of the estimate of entropy."""


def diffusion_map(x: Tensor, sigma: float = 8.0, alpha: float = 0.5, dims: int = 2) -> Tensor:
    """Coordinates of points on the manifold they lie on.

        K_ij = exp(-(|x_i - x_j| / sigma)^(1/2));  K <- K / (p p^T)^alpha, p = K 1;  A = K / (v v^T), v = (K 1)^(1/2);
        U of A = U S V^T;  Y = U[:, 1:] / U[:, 0]

    Args:
        x: [n, d].

    Returns:
        float64 [n, dims].
    """
    x = x.double()
    kernel = torch.exp(-((torch.cdist(x, x) / sigma) ** 0.5))
    p = kernel.sum(0)
    kernel = kernel / torch.outer(p, p) ** alpha
    v = kernel.sum(0).sqrt()
    U = torch.linalg.svd(kernel / torch.outer(v, v)).U
    return (U / U[:, :1])[:, 1 : dims + 1]


def uniform_ranks(y: Tensor) -> Tensor:
    """Each coordinate replaced by its rank, in [0, 1): [n, dims] -> the same."""
    return y.argsort(0).argsort(0).double() / len(y)


def mutual_information(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Of two numbers, from their joint samples, in nats (Kraskov et al. 2004, first estimator); not below 0.

    Args:
        x, y: [n].
        k: neighbours.
    """
    n = len(x)
    k = min(k, n - 1)
    dx, dy = (x[:, None] - x).abs(), (y[:, None] - y).abs()
    joint = torch.maximum(dx, dy).fill_diagonal_(torch.inf)
    radius = joint.kthvalue(k, dim=1).values[:, None]
    others = ~torch.eye(n, dtype=torch.bool)
    near_x, near_y = (((d < radius) & others).sum(1).double() for d in (dx, dy))
    psi = torch.special.digamma
    mean = (psi(near_x + 1) + psi(near_y + 1)).mean()
    return max(float(psi(torch.tensor(float(n))) + psi(torch.tensor(float(k))) - mean), 0.0)


def entropy(y: Tensor, k: int = WIDE) -> float:
    """``-mean log(k / (n rho_k^d))``, rho_k the distance to the k-th neighbour: [n, d], in nats up to a constant."""
    n, d = y.shape
    k = min(k, n - 1)
    rho = torch.cdist(y, y).fill_diagonal_(torch.inf).kthvalue(k, dim=1).values
    return -float(torch.log(k / (n * rho.clamp_min(1e-12) ** d)).mean())


def similarities(states: list[Tensor]) -> Tensor:
    """Normalised information that the states of two layers share, for every pair: float64 [layers, layers], symmetric.

        S_ij = mean over coordinates of I(Y_i, Y_j) / sqrt(|H(Y_i) H(Y_j)|)

    The entropies of coordinates in [0, 1) are mostly negative, both of a pair; their magnitude is taken.

    Args:
        states: of each layer [n, d], of the same n windows.
    """
    laid_out = [uniform_ranks(diffusion_map(x)) for x in states]
    entropies = [entropy(y) for y in laid_out]
    S = torch.zeros(len(states), len(states), dtype=torch.float64)
    for i, a in enumerate(laid_out):
        for j, b in enumerate(laid_out[: i + 1]):
            shared = sum(mutual_information(a[:, c], b[:, c]) for c in range(a.shape[1])) / a.shape[1]
            S[i, j] = S[j, i] = shared / max(abs(entropies[i] * entropies[j]) ** 0.5, 1e-3)
    return S
