"""Factorizations through the matrix's own columns and rows: CUR and interpolative decompositions.

C = W[:, J] [m, r], R = W[I, :] [r, n], input metric G (None identity, [n] diagonal, [n, n] full), G = S S^T.

    column ID   W' = C T      T = C^+ W, optimal for every input metric at once
    row ID      W' = Z R      Z = W G R^T (R G R^T)^+
    CUR         W' = C M R    M = C^+ W G R^T (R G R^T)^+ weighted; C^+ W R^+ plain (CURing, arXiv:2501.04211)

Selected columns or rows may be zero, duplicates or dependent; dependent directions are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.linalg.operands import EPS, TINY, matrix, metric, work_dtype
from corank.linalg.roots import Metric, apply_metric, psd_root, solve_psd


def nested_qr(C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """QR whose first k columns span the first k columns of C, for every k, also if C is rank deficient.

    Args:
        C: [m, r] float64, any r.

    Returns:
        Q [m, r], orthonormal columns, zero where a column depends on its predecessors (remainder below
        32 max(m, r) eps of its own norm); T [r, r] upper triangular with C = Q T up to that cut; kept bool
        [r].
    """
    m, r = C.shape
    norms = C.norm(dim=0)
    cut = 32 * max(m, r) * EPS * norms
    first = 0
    Q, T = C.new_zeros(m, r), C.new_zeros(r, r)
    if r <= m:
        Q, T = torch.linalg.qr(C)
        small = (T.diagonal().abs() <= cut).nonzero()
        if len(small) == 0:
            return Q, T, torch.ones(r, dtype=torch.bool, device=C.device)
        first = int(small[0])
        Q[:, first:], T[:, first:] = 0.0, 0.0
    # Householder continues behind a dependent column with an arbitrary direction that would hide part of the
    # later ones, so from there on the columns are orthogonalised one at a time (twice is enough).
    for i in range(first, r):
        column = C[:, i].clone()
        for _ in range(2):
            overlap = Q[:, :i].T @ column
            column -= Q[:, :i] @ overlap
            T[:i, i] += overlap
        length = column.norm()
        if float(length) > float(cut[i]):
            Q[:, i], T[i, i] = column / length, length
    return Q, T, T.diagonal() != 0


def project_left(C: Tensor, W: Tensor) -> Tensor:
    """C^+ W: the coefficients T [r, n] of the best approximation C T of W [m, n] in the span of C [m, r].

    By QR in float64, the large product in the dtype of W. If columns of C depend on earlier ones their
    coefficients are zero (a basic least-squares solution; the product C T is the same as with the
    pseudo-inverse).

    Returns:
        T [r, n], dtype of W (float32 for half precisions).

    Raises:
        CorankError: not finite matrices, or different row counts.
    """
    matrix("C", C)
    matrix("W", W)
    if C.shape[0] != W.shape[0]:
        raise CorankError(f"C and W need the same number of rows, got {C.shape[0]} and {W.shape[0]}.")
    return _left(C, W).to(work_dtype(W))


def _left(C: Tensor, W: Tensor) -> Tensor:
    Q, T, kept = nested_qr(C.double())
    dtype = work_dtype(W)
    inner = (Q[:, kept].to(dtype).T @ W.to(dtype)).double()
    solution = inner.new_zeros(C.shape[1], W.shape[1])
    solution[kept] = torch.linalg.solve_triangular(T[kept][:, kept], inner, upper=True)
    return solution


def project_right(W: Tensor, R: Tensor, G: Tensor | None = None) -> Tensor:
    """W G R^T (R G R^T)^+: the coefficients Z [m, r] of the best approximation Z R of W [m, n] under G.

    Evaluated as Z0 + (W - Z0 R) G R^T (R G R^T)^+ with the unweighted Z0 = W R^+: exact where W lies in the
    span of R, and in directions G never saw the unweighted projection remains.

    Args:
        W: [m, n].
        R: [r, n].
        G: None, [n] or [n, n].

    Returns:
        Z [m, r], dtype of W (float32 for half precisions).

    Raises:
        CorankError: not finite, or shapes that do not fit.
    """
    matrix("W", W)
    matrix("R", R)
    if W.shape[1] != R.shape[1]:
        raise CorankError(f"W and R need the same number of columns, got {W.shape[1]} and {R.shape[1]}.")
    return _right(W, R, G).to(work_dtype(W))


def _right(W: Tensor, R: Tensor, G: Tensor | None) -> Tensor:
    Z = _left(R.T, W.T).T
    if G is None:
        return Z
    R64, W64 = R.double(), W.double()
    weighted = apply_metric(R64, metric("G", G, W.shape[1]).double())
    moment = weighted @ R64.T
    return Z + solve_psd((moment + moment.T) / 2, weighted @ (W64 - Z @ R64).T).T


def link(C: Tensor, W: Tensor, R: Tensor, G: Tensor | None = None) -> Tensor:
    """The weighted optimum M = C^+ W G R^T (R G R^T)^+ [c, r] of || (W - C M R) S ||_F; dtype of W.

    Its gradient C^T (W - C M R) G R^T is zero. Errors as project_left and project_right.

    Source: the weighted link of CURing's rewrite (M = C^+ (W D)(R D)^+) for any metric.
    """
    matrix("C", C)
    matrix("W", W)
    matrix("R", R)
    if C.shape[0] != W.shape[0] or R.shape[1] != W.shape[1]:
        raise CorankError(f"C M R does not fit W {list(W.shape)}: C is {list(C.shape)}, R is {list(R.shape)}.")
    return _left(C, _right(W, R, G)).to(work_dtype(W))


def plain_link(C: Tensor, W: Tensor, R: Tensor) -> Tensor:
    """The unweighted M = C^+ W R^+ [c, r] of the CURing paper (arXiv:2501.04211); dtype of W."""
    return link(C, W, R)


def column_id(W: Tensor, J: Tensor) -> Tensor:
    """Coefficients T [r, n] of the column ID W' = W[:, J] T; T[:, J] = I exactly.

    Args:
        W: [m, n].
        J: int64 [r], distinct columns.

    Raises:
        CorankError: indices repeated or out of range, W not a finite matrix.
    """
    matrix("W", W)
    J = _indices("J", J, W.shape[1])
    T = project_left(W[:, J], W)
    T[:, J] = torch.eye(len(J), dtype=T.dtype, device=T.device)
    return T


def row_id(W: Tensor, I: Tensor, G: Tensor | None = None) -> Tensor:
    """Coefficients Z [m, r] of the row ID W' = Z W[I]; Z[I] = I exactly, so the selected outputs stay exact.

    Args:
        W: [m, n].
        I: int64 [r], distinct rows.
        G: input metric: None, [n] or [n, n].

    Raises:
        CorankError: indices repeated or out of range, not finite, G of the wrong shape.
    """
    matrix("W", W)
    I = _indices("I", I, W.shape[0])
    Z = project_right(W, W[I], G)
    Z[I] = torch.eye(len(I), dtype=Z.dtype, device=Z.device)
    return Z


def column_curve(W: Tensor, J: Tensor, G: Tensor | None = None, *, root: Tensor | None = None) -> Tensor:
    """|| (W - C_k T_k) S ||_F^2 of the column ID with the first k columns of J, for k = 0 .. r.

    With C = Q T the projection is nested, so loss(k) = || W S ||^2 - sum_(i < k) q_i^T W G W^T q_i: one QR
    for all k.

    Args:
        W: [m, n].
        J: int64 [r] distinct, in nested order.
        G: input metric: None, [n] or [n, n].
        root: psd_root(G) if known; G may then be None.

    Returns:
        float64 [r + 1], never increasing, >= 0.

    Raises:
        CorankError: indices repeated or out of range, not finite, G of the wrong shape.
    """
    W64, geometry = matrix("W", W).double(), Metric.of(G, root, W.shape[1])
    Q, _, _ = nested_qr(W64[:, _indices("J", J, W.shape[1])])
    A = Q.T @ W64
    return _curve(geometry.total(W64), (geometry.weigh(A) * A).sum(1).cumsum(0))


def row_curve(W: Tensor, I: Tensor, G: Tensor | None = None, *, root: Tensor | None = None) -> Tensor:
    """|| (W - Z_k R_k) S ||_F^2 of the weighted row ID with the first k rows of I, for k = 0 .. r.

    loss(k) = || W S ||^2 - || W S Q_k ||^2 with (R S)^T = Q T: one QR for all k. Arguments, result and errors
    as column_curve.
    """
    W64, geometry = matrix("W", W).double(), Metric.of(G, root, W.shape[1])
    E = _row_projection(W64, W64[_indices("I", I, W.shape[0])], geometry)
    return _curve(geometry.total(W64), E.square().sum(0).cumsum(0))


def cur_curve(
    W: Tensor,
    I: Tensor,
    J: Tensor,
    G: Tensor | None = None,
    weighted: bool = True,
    *,
    root: Tensor | None = None,
) -> Tensor:
    """|| (W - C_k M_k R_k) S ||_F^2 of CUR with the first k rows and columns, for k = 0 .. r, from two QRs.

    Weighted link, with C = Qc Tc, (R S)^T = Qr Tr and K = Qc^T W S Qr:
        loss(k) = || W S ||^2 - || K[:k, :k] ||^2.
    Plain link (unweighted projectors, measured under G), with R^T = Qr Tr, K = Qc^T W Qr, N = Qc^T W G Qr and
    H = Qr^T G Qr:
        loss(k) = || W S ||^2 - 2 sum (K o N)[:k, :k] + sum_(a < k) K[a, :k] H[:k, :k] K[a, :k]^T.
    In the last sum row a and column s together add K[a, s] (2 sum_(c < s) H[s, c] K[a, c] + H[s, s] K[a, s]),
    so it is a sum over leading blocks as well and one product with the strict lower triangle of H gives all
    k.

    Args:
        W: [m, n].
        I: int64 [r] distinct rows, nested order.
        J: int64 [r] distinct columns, nested order; as many as rows.
        G: input metric: None, [n] or [n, n].
        weighted: which link, `link` (True) or `plain_link` (False).
        root: psd_root(G) if known; G may then be None.

    Returns:
        float64 [r + 1], >= 0; never increasing for the weighted link.

    Raises:
        CorankError: indices repeated or out of range, len(I) != len(J), not finite, G of the wrong shape.
    """
    W64, geometry = matrix("W", W).double(), Metric.of(G, root, W.shape[1])
    I, J = _indices("I", I, W.shape[0]), _indices("J", J, W.shape[1])
    if len(I) != len(J):
        raise CorankError(f"cur_curve needs as many rows as columns, got {len(I)} and {len(J)}.")
    total = geometry.total(W64)
    Qc, _, _ = nested_qr(W64[:, J])
    if weighted:
        K = Qc.T @ _row_projection(W64, W64[I], geometry)
        return _curve(total, _leading_blocks(K.square()))
    Qr, _, _ = nested_qr(W64[I].T)
    A = Qc.T @ W64
    K, N = A @ Qr, geometry.weigh(A) @ Qr
    H = geometry.moment(Qr.T)  # its lower triangle
    return _curve(total, _leading_blocks(K * (2 * N - 2 * K @ H.tril(-1).T - K * H.diagonal())))


def _indices(name: str, index: Tensor, size: int) -> Tensor:
    if index.ndim != 1 or index.is_floating_point():
        raise CorankError(f"{name} must be a 1-D integer tensor of indices.")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= size or len(index.unique()) < len(index)):
        raise CorankError(f"{name} must hold distinct indices between 0 and {size - 1}.")
    return index.long()


def _row_projection(W: Tensor, R: Tensor, geometry: Metric) -> Tensor:
    """E = W S Q [m, r], Q the nested orthonormal basis of the rows of R S (zero columns: dependent rows)."""
    if geometry.root is None and geometry.G is not None and geometry.G.ndim == 2:
        # Q^T = T^-T R S needs no root of G: T^T is the Cholesky factor of R G R^T. Taken only if far from
        # singular.
        weighted = R @ geometry.G
        moment = weighted @ R.T
        scale = moment.diagonal().clamp_min(TINY).sqrt()
        factor, info = torch.linalg.cholesky_ex(moment / scale / scale[:, None])
        if int(info) == 0 and (len(R) == 0 or float(factor.diagonal().min()) > 1e-4):
            return torch.linalg.solve_triangular(factor, (weighted @ W.T) / scale[:, None], upper=False).T
        geometry = Metric(None, psd_root(geometry.G))
    Q, _, _ = nested_qr(geometry.rooted(R).T)
    return geometry.rooted(W) @ Q


def _leading_blocks(K: Tensor) -> Tensor:
    """sum K[:k, :k] for k = 1 .. r of a square K."""
    return K.cumsum(0).cumsum(1).diagonal()


def _curve(total: float, captured: Tensor) -> Tensor:
    return (total - torch.cat([captured.new_zeros(1), captured])).clamp_min(0.0)
