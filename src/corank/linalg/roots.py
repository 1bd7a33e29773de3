"""Roots of positive semi-definite matrices and the one solve with them that never needs luck.

A metric G [n, n] (a second moment, a Fisher matrix) is used as G = S S^T; any root S gives the same loss
|| D S ||_F^2 = tr(D G D^T). Here S comes from an eigendecomposition cut at the rounding level, so
rank-deficient statistics (fewer tokens than channels, dead channels, duplicates) are a normal case and no
jitter is needed. A diagonal metric is a 1-D tensor of its diagonal and stays one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.linalg.operands import EPS, TINY, finite, metric


def _spectrum(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, > n eps max) and their eigenvectors of G [n, n], in float64."""
    values, vectors = torch.linalg.eigh(G.double())
    values, vectors = values.flip(0), vectors.flip(1)
    keep = int((values > len(values) * EPS * values[:1].clamp_min(0)).sum())
    return values[:keep], vectors[:, :keep]


def psd_root(G: Tensor) -> Tensor:
    """A root S of a positive semi-definite metric, S S^T = G.

    Args:
        G: [n, n] symmetric positive semi-definite (only rounding-level negative eigenvalues; they are
            dropped), or [n], the diagonal of a diagonal metric.

    Returns:
        S [n, p] with p = rank(G) numerically (eigenvalues above n eps max), columns by descending eigenvalue;
        for a 1-D G the element-wise root [n]. dtype of G (the eigendecomposition is float64).

    Raises:
        CorankError: wrong shape, NaN or infinity, negative diagonal.

    Source: the eigen-root of SVD-LLM V2 (arXiv:2503.12340), which replaces Cholesky.
    """
    metric("G", G, G.shape[0])
    if G.ndim == 1:
        return G.clamp_min(0).sqrt()
    values, vectors = _spectrum(G)
    return (vectors * values.sqrt()).to(G.dtype)


def psd_sqrt(G: Tensor) -> Tensor:
    """The symmetric root G^(1/2), [n, n], or [n] for a diagonal metric. Same rules as psd_root."""
    metric("G", G, G.shape[0])
    if G.ndim == 1:
        return G.clamp_min(0).sqrt()
    values, vectors = _spectrum(G)
    return ((vectors * values.sqrt()) @ vectors.T).to(G.dtype)


def apply_root(W: Tensor, S: Tensor) -> Tensor:
    """W S for W [m, n] and a root S [n, p], or the root [n] of a diagonal metric."""
    return W * S if S.ndim == 1 else W @ S


def apply_metric(W: Tensor, G: Tensor | None) -> Tensor:
    """W G for W [m, n] and a metric G: None is the identity, [n] a diagonal, [n, n] full."""
    if G is None:
        return W
    return W * G if G.ndim == 1 else W @ G


def solve_psd(K: Tensor, Y: Tensor) -> Tensor:
    """A solution X of min || K X - Y || for a positive semi-definite K, also a singular one; no inverse is
    formed.

    K is scaled to unit diagonal first (one loud channel must not decide what counts as zero). A well
    conditioned K is solved by Cholesky; a doubtful one by an eigendecomposition that leaves out eigenvalues
    below n eps max.

    Args:
        K: [n, n] symmetric positive semi-definite, float64.
        Y: [n, p], float64; for a singular K its columns should lie in range(K).

    Returns:
        X [n, p] float64.
    """
    if K.shape[0] == 0:
        return Y.clone()
    scale = K.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = K / scale / scale[:, None]
    factor, info = torch.linalg.cholesky_ex(scaled)
    rhs = Y / scale[:, None]
    if int(info) == 0 and float(factor.diagonal().min()) > 1e-5:
        return torch.cholesky_solve(rhs, factor) / scale[:, None]
    values, vectors = _spectrum(scaled)
    return (vectors @ ((vectors.T @ rhs) / values[:, None])) / scale[:, None]


def lower_product(A: Tensor, B: Tensor) -> Tensor:
    """The lower triangle of a product A B^T known to be symmetric, with five eighths of the work."""
    size = len(A)
    step = max(-(-size // 4), 64)
    if step >= size:
        return A @ B.T
    out = A.new_zeros(size, size)
    for i in range(0, size, step):
        out[i : i + step, : i + step] = A[i : i + step] @ B[: i + step].T
    return out


def single(A: Tensor) -> tuple[Tensor, float]:
    """A in float32 and the factor it was divided by to fit: A = factor * float32."""
    peak = max(abs(float(bound)) for bound in torch.aminmax(A)) if A.numel() else 1.0
    if 1e-9 < peak < 1e9:
        return A.float(), 1.0
    peak = max(peak, TINY)
    return (A / peak).float(), peak


@dataclass(frozen=True)
class Metric:
    """An input metric G = S S^T on n channels in whichever form it is at hand; nothing given: the identity.

    Attributes:
        G: float64 [n, n], [n] (diagonal) or None.
        root: S, float64 [n, p] or [n]; preferred over G where given.
    """

    G: Tensor | None = None
    root: Tensor | None = None

    @classmethod
    def of(cls, G: Tensor | None, root: Tensor | None, size: int) -> Metric:
        """Check both forms against `size` channels, take them to float64. Raises CorankError as `metric`."""
        if G is not None:
            G = metric("G", G, size).double()
        if root is None:
            return cls(G)
        if root.ndim not in (1, 2) or root.shape[0] != size or not finite(root):
            raise CorankError(f"root must be a finite [{size}, p] or [{size}] tensor, got {list(root.shape)}.")
        return cls(G, root.double())

    def weigh(self, A: Tensor) -> Tensor:
        """A G for A [k, n]."""
        if self.root is None:
            return apply_metric(A, self.G)
        return A * self.root.square() if self.root.ndim == 1 else (A @ self.root) @ self.root.T

    def rooted(self, A: Tensor) -> Tensor:
        """A S for A [k, n]; a full G without a root is decomposed."""
        if self.root is not None:
            return apply_root(A, self.root)
        return A if self.G is None else apply_root(A, psd_root(self.G))

    def moment(self, A: Tensor) -> Tensor:
        """A G A^T [k, k]; only the lower triangle is filled, which is all that eigh and Cholesky read."""
        if self.root is not None:
            A = apply_root(A, self.root)
        return lower_product(A if self.root is not None else apply_metric(A, self.G), A)

    def total(self, A: Tensor) -> float:
        """tr(A G A^T) = || A S ||_F^2."""
        if self.root is not None:
            return float(apply_root(A, self.root).square().sum())
        return float((self.weigh(A) * A).sum())

    def times(self, A: Tensor, Z: Tensor) -> Tensor:
        """(A G A^T) Z for Z [k, p] without forming the k x k matrix."""
        return A @ self.weigh(Z.T @ A).T

    def single(self) -> tuple[Metric, float]:
        """The metric in float32, and the factor taken out of it so that nothing overflows."""
        if self.root is not None:
            scaled, factor = single(self.root)
            return Metric(None, scaled), factor**2
        if self.G is None:
            return self, 1.0
        scaled, factor = single(self.G)
        return Metric(scaled), factor
