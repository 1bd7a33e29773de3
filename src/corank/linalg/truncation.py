"""The best rank-k approximation of W under a geometry, for every k from one eigendecomposition.

minimise || L (W - W') S ||_F^2 over rank(W') <= k, with G = S S^T the input metric and R = L^T L the output
metric.

No inverse, no Cholesky, no jitter: with M = L W G W^T L^T = U diag(energy) U^T and R = I the optimum is the
projection W' = U_k U_k^T W, identical on range(G) to the published form U_k Sigma_k V_k^T S^-1 of svd(W S)
(SVD-LLM, arXiv:2403.07378), to the eigen-root form (SVD-LLM V2, arXiv:2503.12340) and to output PCA
(Swift-SVD, arXiv:2604.01609; LORD, arXiv:2309.14021). Off range(G) the projection keeps what the
pseudo-inverse form throws away. With R it is the oblique projection W' = L^+ U_k U_k^T L W (as in KFAC-SVD).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corank.errors import CorankError, unknown
from corank.linalg.operands import EPS, TINY, gaussian, matrix, metric, work_dtype
from corank.linalg.roots import Metric, lower_product, psd_root, single

PRECISIONS = ("double", "mixed")
ROUTES = ("auto", "output", "input", "randomized")
PROBES = 8
RESOLVED = 4.0
"""A float32 eigenvalue counts as resolved if it exceeds this many times the measured error of the float32
factorization. At 4 all matrices tried of a real language model stay within 0.1% of the float64 losses."""


@dataclass(frozen=True)
class Truncation:
    """All truncations of one matrix: W' = up[:, :k] (project[:k] W).

    Attributes:
        up: [m, p], output factors by descending energy; orthonormal columns unless there is an output metric.
        project: [p, m]; project @ up = I.
        energy: float64, descending squared singular values of L W S: all min(m, n) of them, or the first
            `rank` on the randomized route. p is smaller if `rank` was given or the output metric is singular.
        total: || L W S ||_F^2.
    """

    up: Tensor
    project: Tensor
    energy: Tensor
    total: float

    def pair(self, W: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The optimal factors B = up[:, :k] [m, k] and A = project[:k] W [k, n] in the dtype of `up`.

        With a singular output metric fewer than k directions may have energy; then there are only so many.

        Raises:
            CorankError: k is negative, larger than min(m, n), or larger than the `rank` given to truncate.
        """
        p, limit = self.up.shape[1], len(self.energy)
        if not 0 <= k <= limit or (k > p and float(self.energy[p]) > 1e-11 * self.total):
            raise CorankError(f"rank must be between 0 and {min(p, limit)}, got {k}.")
        return self.up[:, :k], self.project[:k] @ W.to(self.project.dtype)

    def loss(self) -> Tensor:
        """|| L (W - W'_k) S ||_F^2 for k = 0 .. len(energy): float64 [len(energy) + 1], never increasing."""
        # Summed from the small end: total minus head would leave rounding noise where the true tail is tiny.
        tail = torch.cat([self.energy, self.energy.new_zeros(1)]).flip(0).cumsum(0).flip(0)
        outside = self.total - float(tail[0])  # of directions never computed (randomized route)
        return tail + outside if outside > 1e-12 * self.total else tail


def truncate(
    W: Tensor,
    G: Tensor | None = None,
    *,
    R: Tensor | None = None,
    root: Tensor | None = None,
    rank: int | None = None,
    precision: str = "double",
    route: str = "auto",
    generator: torch.Generator | None = None,
) -> Truncation:
    """Factorize W optimally under || L (W - W') S ||_F, for all ranks at once.

    Args:
        W: [m, n]; float32 or float64 (half precisions are computed and returned as float32).
        G: input metric S S^T: [n, n] positive semi-definite of any rank, [n] a diagonal, None the identity.
        R: output metric L^T L: [m, m] positive semi-definite, [m] a diagonal, None the identity.
        root: psd_root(G), when siblings share it; G may then be None.
        rank: keep only this many leading vectors (the energies stay complete where they are free).
        precision: "double" works in float64. "mixed" multiplies and decomposes in float32, measures the error
            of that with float64 probes and repairs what float32 cannot resolve by a float64 Rayleigh-Ritz
            step; its losses stay within 0.1% of "double" wherever they exceed 1e-4 of the total. If float32
            resolves less than half of the directions it silently becomes "double". Energies past `rank`,
            where one is given, may be as coarse as float32.
        route: "output" decomposes the [m, m] matrix L W G W^T L^T; "input" takes W = Q T first and decomposes
            the [n, n] matrix T G T^T; "randomized" finds the leading `rank` vectors by power iteration,
            worthwhile for rank < min(m, n) / 4 only; "auto" is input for m > n, else output.
        generator: seed of the randomized route.

    Returns:
        Truncation. Without R it holds min(m, n) orthonormal vectors (or `rank`) even if W G W^T is singular,
        those without energy ordered by || u^T W ||, so rank min(m, n) is lossless: W' = W. The same with a
        non-singular R. With a singular R it holds one vector per non-zero energy; outputs R does not see are
        then fitted by least squares on the kept features. up and project have the dtype of W, energy is
        float64.

    Raises:
        CorankError: bad shapes, NaN or infinity, unknown precision or route, rank out of range, randomized
            without rank.
    """
    m, n = matrix("W", W).shape
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if route not in ROUTES:
        raise unknown("route", route, ROUTES)
    if rank is not None and not 0 <= rank <= min(m, n):
        raise CorankError(f"rank must be between 0 and {min(m, n)} for a {m} x {n} matrix, got {rank}.")
    if route == "randomized" and rank is None:
        raise CorankError("The randomized route needs a rank; give rank= or use route='auto'.")
    left = _Left(W.double(), R)
    right = Metric.of(G, root, n)
    X = left.X

    if route == "randomized":
        U, energy, total = _randomized(X, right, min(rank or 0, X.shape[0]), generator)
    else:
        tall = X.shape[0] > n if route == "auto" else route == "input"
        core, widen = _triangle(X, work_dtype(W)) if tall else (X, None)
        # In a tall core float32 noise could rank a direction outside range(W) before one inside: no mixed.
        found = _eigen_mixed(core, right, rank) if precision == "mixed" and core.shape[0] <= n else None
        U, energy = found if found is not None else _eigen(core, right)
        U = U[:, : min(m, n) if rank is None else rank]
        # A singular R leaves fewer directions than ranks; the rest has no energy.
        energy = torch.cat([energy, energy.new_zeros(n)])[: min(m, n)]
        total = float(energy.sum())
        U = U if widen is None else widen(U)

    up, project = left.lift(U, energy, right)
    return Truncation(up.to(work_dtype(W)), project.to(work_dtype(W)), energy, total)


class _Left:
    """The output metric: X = L W on the way in, L^+ (or its least-squares stand-in) on the way out."""

    def __init__(self, W: Tensor, R: Tensor | None) -> None:
        self.W, self.L = W, None
        if R is None:
            self.X = W
            return
        S = psd_root(metric("R", R, W.shape[0]).double())
        if S.ndim == 1 and bool((S == 0).any()):
            S = torch.diag(S)[:, S > 0]
        self.L = S if S.ndim == 1 else S.T
        self.X = W * S[:, None] if S.ndim == 1 else self.L @ W

    def lift(self, U: Tensor, energy: Tensor, right: Metric) -> tuple[Tensor, Tensor]:
        """From eigenvectors U of L W G W^T L^T to (up, project)."""
        if self.L is None:
            return U, U.T
        U = U.to(self.L.dtype)  # the tall route widens in the precision of W
        if self.L.ndim == 1:
            return U / self.L[:, None], U.T * self.L
        if self.L.shape[0] == self.L.shape[1]:
            return self.L.T @ (U / self.L.square().sum(1)[:, None]), U.T @ self.L
        # Singular R: L^+ U would be zero where R sees nothing. E[y z^T] E[z z^T]^-1 for the kept features z =
        # U^T L y satisfies L up = U as well and is the best guess for the unseen outputs.
        kept = energy[: U.shape[1]]
        seen = int((kept > 1e-12 * energy[:1]).sum())
        U = U[:, :seen]
        return (self.W @ right.weigh(U.T @ self.X).T) / kept[:seen], U.T @ self.L


def _triangle(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """X = Q T: the triangular T, and the map U -> Q U with its large product in `dtype`."""
    gram = lower_product(X.T, X.T)
    scale = gram.diagonal().sqrt().clamp_min(TINY)
    factor, info = torch.linalg.cholesky_ex(gram / scale / scale[:, None])
    if int(info) == 0 and X.shape[0] >= X.shape[1] and float(factor.diagonal().min()) > 1e-2:
        # For the well conditioned matrices of real networks T by Cholesky and Q U = X (T^-1 U) cost half of a
        # Householder QR, and stay orthonormal to 1e4 roundoffs of the product.
        T = factor.T * scale

        def widen(U: Tensor) -> Tensor:
            return X.to(dtype) @ torch.linalg.solve_triangular(T, U, upper=True).to(dtype)

        return T, widen
    Q, T = torch.linalg.qr(X)
    return T, lambda U: Q @ U


def _eigen(core: Tensor, right: Metric) -> tuple[Tensor, Tensor]:
    """Complete eigenvectors U [q, q] and energies [q], descending, of core G core^T; all float64."""
    values, U = torch.linalg.eigh(right.moment(core))
    energy, U = values.flip(0).clamp_min(0), U.flip(1)
    silent = energy <= len(energy) * EPS * energy[:1]
    energy = energy.masked_fill(silent, 0.0)
    loud = len(energy) - int(silent.sum())
    if loud < len(energy):
        # Directions without energy are arbitrary for the calibration data. Order them by what is left of W
        # there: this makes rank min(m, n) lossless and is the best guess for inputs never seen.
        remainder = U[:, loud:].T @ core
        order = torch.linalg.eigh(remainder @ remainder.T).eigenvectors.flip(1)
        U = torch.cat([U[:, :loud], U[:, loud:] @ order], 1)
    return U, energy


def _eigen_mixed(core: Tensor, right: Metric, rank: int | None) -> tuple[Tensor, Tensor] | None:
    """_eigen with the cubic work in float32; None if float32 resolves too little."""
    size = core.shape[0]
    core32, peak = single(core)
    metric32, factor = right.single()
    values, U = torch.linalg.eigh(metric32.moment(core32))
    values, U = values.flip(0).double() * (factor * peak**2), U.flip(1).double()
    # The float64 residual on random probes measures the float32 error, that of the products included.
    probes = gaussian(size, PROBES, core, None)
    exact = right.times(core, probes)
    error = float((exact - U @ (values[:, None] * (U.T @ probes))).norm()) / PROBES**0.5
    head = int((values > RESOLVED * error).sum())
    if head == size or (rank is not None and rank < head):
        return U, values.clamp_min(0.0)
    if head < size / 2:
        return None
    tail = torch.linalg.qr(U[:, head:]).Q
    V, ritz = _eigen(tail.T @ core, right)
    return torch.cat([U[:, :head], tail @ V], 1), torch.cat([values[:head], ritz])


def _randomized(
    core: Tensor, right: Metric, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, float]:
    """The leading eigenpairs of core G core^T by block power iteration and a Rayleigh-Ritz step."""
    width = min(rank + max(8, rank // 8), core.shape[0])
    Q = torch.linalg.qr(right.times(core, gaussian(core.shape[0], width, core, generator))).Q
    for _ in range(2):
        Q = torch.linalg.qr(right.times(core, Q)).Q
    V, energy = _eigen(Q.T @ core, right)
    return Q @ V[:, :rank], energy[:rank], right.total(core)
