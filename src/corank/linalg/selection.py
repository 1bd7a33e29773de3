"""Choosing r columns (or rows) of a matrix that represent all of it: one interface, many rules.

Names, with the singular basis V_r of A ([n, r], the leading right singular vectors; left ones for rows):

    deim        row pivots of LU with partial pivoting on V_r. This IS the discrete empirical interpolation
    method
                (Sorensen and Embree, arXiv:1407.5516): the same indices without the loop.
    qdeim       column-pivoted QR of V_r^T (Drmac and Gugercin, arXiv:1505.00370); depends on the subspace
    only. qr          column-pivoted QR of A itself (Golub; Gu and Eisenstat for the theory).
    leverage    largest row norms of V_r (Drineas, Mahoney, Muthukrishnan, deterministic variant).
    norm        largest column norms of A.
    maxvol      LU pivots of V_r, then swaps to a dominant submatrix (Goreinov, Tyrtyshnikov).
    sketch      LU pivots of a slightly wider Gaussian sketch of A, thinned by a small pivoted QR; needs no
    SVD
                (Dong and Martinsson, "Simpler is better").
    random      uniform without replacement.
    curing-v1   the selection loop of the CURing paper's code (Park and Moon, arXiv:2501.04211), which is not
    DEIM:
                it enforces only the newest interpolation condition.
    curing-v2   the loop of its later rewrite, which moreover subtracts one vector from all later basis
    vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from corank.errors import CorankError, unknown
from corank.linalg.operands import matrix, seeded, work_dtype
from corank.linalg.randomized import sketch
from corank.linalg.truncation import truncate


def select(
    A: Tensor,
    r: int,
    how: str = "deim",
    *,
    axis: int = 1,
    basis: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Select r distinct columns (axis=1) or rows (axis=0) of A.

    Most important first where the rule has an order. Scale A first for a weighted selection: A = W diag(rms
    x) or A = W S.

    Args:
        A: [m, n] float32 or float64.
        r: how many; at most min(m, n) for the rules that use singular vectors, a sketch or QR.
        how: one of SELECTORS.
        axis: 1 selects columns, 0 rows.
        basis: singular vectors [n, >= r] (columns; [m, >= r] for rows) if known already. Rules that need none
            ignore it. With a given basis the first k of the result for deim, curing-v1, curing-v2 and
            leverage (which scores by all given vectors) are the selection at k, as are always those for qr
            and norm.
        generator: seed of sketch and random; None is a fixed seed.

    Returns:
        int64 [r] on the device of A.

    Raises:
        CorankError: unknown rule, r or axis out of range, basis of the wrong shape, A not a finite matrix.
    """
    matrix("A", A)
    if how not in _RULES:
        raise unknown("selector", how, SELECTORS)
    if axis not in (0, 1):
        raise CorankError(f"axis must be 1 (columns) or 0 (rows), got {axis}.")
    A = (A if axis == 1 else A.T).to(work_dtype(A))
    n = A.shape[1]
    limit = n if how in ("norm", "random") else min(A.shape)
    needs_basis = how in _FROM_BASIS
    if needs_basis and basis is not None:
        matrix("basis", basis)
        if basis.shape[0] != n:
            raise CorankError(f"basis must have {n} rows, one per candidate, got shape {list(basis.shape)}.")
        basis = basis.to(work_dtype(basis))
        limit = min(n, basis.shape[1])
    if not 0 <= r <= limit:
        raise CorankError(f"The selector {how} can select between 0 and {limit} here, got {r}.")
    if r == 0:
        return torch.empty(0, dtype=torch.long, device=A.device)
    if needs_basis and basis is None:
        basis = truncate(A.T, rank=r).up
    chosen = _RULES[how](A, r, basis, generator)
    return chosen.to(device=A.device, dtype=torch.long)


def lu_pivots(V: Tensor) -> Tensor:
    """Row pivots of LU with partial pivoting on V [n, k], k <= n: int64 [k]. On a singular basis: DEIM."""
    swaps = torch.linalg.lu_factor_ex(V)[1].tolist()
    order = list(range(V.shape[0]))
    for i, j in enumerate(swaps):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order[: V.shape[1]], dtype=torch.long, device=V.device)


def qr_pivots(A: Tensor) -> Tensor:
    """Column pivots of LAPACK geqp3 on A [m, n], on the CPU (torch has no pivoted QR): int64 [min(m, n)]."""
    if A.shape[0] > A.shape[1]:
        A = torch.linalg.qr(A.double(), mode="r").R
    work = np.array(A.detach().double().cpu().numpy(), order="F", copy=True)
    _, pivots = scipy.linalg.qr(work, mode="r", pivoting=True, overwrite_a=True, check_finite=False)
    return torch.from_numpy(pivots[: min(A.shape)].astype(np.int64)).to(A.device)


def maxvol(V: Tensor, start: Tensor, tolerance: float = 1.05, max_swaps: int | None = None) -> tuple[Tensor, Tensor]:
    """Swap rows into the selection until no coefficient exceeds the tolerance.

    Args:
        V: [n, k] of full column rank, best orthonormal.
        start: int64 [k] distinct rows with V[start] non-singular.
        tolerance: stop when max |F| <= tolerance, F = V V[rows]^-1; each swap multiplies |det V[rows]| by
            more than it.
        max_swaps: give up after this many; None is 10 k + 100.

    Returns:
        rows int64 [k], and F [n, k] with F[rows] = I exactly.

    Source: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov, Zamarashkin, "How to find a good submatrix"
    (2010).
    """
    n, k = V.shape
    rows = start.clone()
    F, moved = _interpolation(V, rows), False
    for _ in range(10 * k + 100 if max_swaps is None else max_swaps):
        if k == 0 or n == k:
            break
        flat = int(F.abs().argmax())
        i, j = divmod(flat, k)
        if float(F[i, j].abs()) <= tolerance:
            break
        row = F[i].clone()
        row[j] -= 1.0
        F.addr_(F[:, j] / F[i, j], row, alpha=-1.0)
        rows[j], moved = i, True
    # The rank-one updates drift; the returned coefficients are solved for afresh.
    return rows, _interpolation(V, rows) if moved else F


def _interpolation(V: Tensor, rows: Tensor) -> Tensor:
    F = torch.linalg.solve(V[rows].T, V.T).T.contiguous()
    F[rows] = torch.eye(len(rows), dtype=F.dtype, device=F.device)
    return F


def _top(scores: Tensor, r: int) -> Tensor:
    return torch.sort(scores, descending=True, stable=True).indices[:r]


def _deim(A: Tensor, r: int, V: Tensor, generator: torch.Generator | None) -> Tensor:
    return lu_pivots(V[:, :r])


def _qdeim(A: Tensor, r: int, V: Tensor, generator: torch.Generator | None) -> Tensor:
    return qr_pivots(V[:, :r].T)


def _qr(A: Tensor, r: int, V: Tensor | None, generator: torch.Generator | None) -> Tensor:
    return qr_pivots(A)[:r]


def _leverage(A: Tensor, r: int, V: Tensor, generator: torch.Generator | None) -> Tensor:
    return _top(V.double().square().sum(1), r)


def _norm(A: Tensor, r: int, V: Tensor | None, generator: torch.Generator | None) -> Tensor:
    return _top(A.double().square().sum(0), r)


def _maxvol(A: Tensor, r: int, V: Tensor, generator: torch.Generator | None) -> Tensor:
    Q = torch.linalg.qr(V[:, :r].double()).Q
    return maxvol(Q, lu_pivots(Q))[0]


def _sketch(A: Tensor, r: int, V: Tensor | None, generator: torch.Generator | None) -> Tensor:
    width = min(r + max(10, r // 8), *A.shape)
    Y = sketch(A, width, generator)
    candidates = lu_pivots(Y.T.contiguous())
    return candidates[qr_pivots(Y[:, candidates])[:r]]


def _random(A: Tensor, r: int, V: Tensor | None, generator: torch.Generator | None) -> Tensor:
    source = seeded(generator)
    return torch.randperm(A.shape[1], generator=source, device=source.device)[:r]


def _curing(A: Tensor, r: int, V: Tensor, keep_coefficient: bool) -> Tensor:
    V = V[:, :r].double().clone()
    free = torch.ones(V.shape[0], dtype=torch.bool, device=V.device)
    chosen = torch.empty(r, dtype=torch.long, device=V.device)
    for i in range(r):
        chosen[i] = p = int(torch.where(free, V[:, i].abs(), -1.0).argmax())
        free[p] = False
        newest = V[p, : i + 1]
        energy = newest.square().sum()
        # pinv of a 1 x (i + 1) row is row^T / |row|^2. Version 2 floors the denominator and drops the
        # coefficients.
        step = V[:, : i + 1] @ (newest / energy.clamp_min(1e-12 if not keep_coefficient else 1e-300))
        if keep_coefficient:
            V[:, i + 1 :] -= torch.outer(step, V[p, i + 1 :].clone())
        else:
            V[:, i + 1 :] -= step[:, None]
    return chosen


def _curing_v1(A: Tensor, r: int, V: Tensor, generator: torch.Generator | None) -> Tensor:
    return _curing(A, r, V, keep_coefficient=True)


def _curing_v2(A: Tensor, r: int, V: Tensor, generator: torch.Generator | None) -> Tensor:
    return _curing(A, r, V, keep_coefficient=False)


_FROM_BASIS: dict[str, Callable[..., Tensor]] = {
    "deim": _deim,
    "qdeim": _qdeim,
    "leverage": _leverage,
    "maxvol": _maxvol,
    "curing-v1": _curing_v1,
    "curing-v2": _curing_v2,
}
_RULES: dict[str, Callable[..., Tensor]] = {
    **_FROM_BASIS,
    "qr": _qr,
    "norm": _norm,
    "sketch": _sketch,
    "random": _random,
}
SELECTORS: tuple[str, ...] = (
    "deim",
    "qdeim",
    "qr",
    "leverage",
    "norm",
    "maxvol",
    "sketch",
    "random",
    "curing-v1",
    "curing-v2",
)
