"""Doing without some of the inputs of a matrix: which ones, and what the others take over.

W [m, n] multiplies z in R^n with second moment C = E[z z^T]. Only z_J is kept. What is best done with it is a least
squares problem, min over V of E || W z - V z_J ||^2, and its value is what removing the rest costs:

    V = W C[:, J] C_JJ^+,      loss = tr(W (C - C[:, J] C_JJ^+ C[J, :]) W^T)

The same matrix comes out of the Nystrom approximation of C (MoDeGPT, arXiv:2408.09632) and of removing the other columns
one after another by the Optimal Brain Surgeon with H = C (SlimGPT, arXiv:2412.18110): these are three names for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.linalg.operands import matrix, metric
from corank.linalg.roots import solve_psd

CONSTANT = 1e-12
"""Share of a channel's mean square below which its variance is rounding."""

PANEL = 64
"""Columns removed between two products with whole matrices."""


def _damping(C: Tensor, ridge: float) -> float:
    if not ridge >= 0:
        raise CorankError(f"ridge must be >= 0, got {ridge}.")
    return ridge * float(C.diagonal().mean()) if len(C) else 0.0


def column_least_squares(
    W: Tensor, C: Tensor, kept: Tensor, *, ridge: float = 0.0, cross: Tensor | None = None
) -> Tensor:
    """The matrix V for which V z_J comes nearest to W z.

    Evaluated as V = W_J + (T - W_J C_JJ)(C_JJ + rho I)^+ with T = W C[:, J]: directions that C has not seen, in
    channels of unit power, keep the coefficients of W, and so does everything if nothing is removed; no inverse is formed.

    Args:
        W: [m, n].
        C: E[z^ z^^T] [n, n], symmetric positive semi-definite, of the inputs that will really come; singular is fine.
        kept: int64 [k], J.
        ridge: pull towards W_J, relative to the mean of diag C_JJ.
        cross: E[z z^^T] [n, n] if W z is wanted for other inputs z than will come; None: z = z^.

    Returns:
        V [m, k] float64.

    Raises:
        CorankError: shapes that do not fit, NaN or infinity, ridge < 0.
    """
    W, C = matrix("W", W).double(), metric("C", C, W.shape[1]).double()
    selected, moment = W[:, kept], C[kept][:, kept]
    if cross is None:
        # T - W_J C_JJ is what the removed columns contribute: no difference of large numbers
        removed = complement(kept, W.shape[1])
        missing = W[:, removed] @ C[removed][:, kept]
    else:
        missing = W @ metric("cross", cross, W.shape[1]).double()[:, kept] - selected @ moment
    rho = _damping(moment, ridge)
    if rho:
        moment.diagonal().add_(rho)
    return selected + solve_psd(moment, missing.T).T


def affine_column_least_squares(
    W: Tensor,
    C: Tensor,
    mean: Tensor,
    kept: Tensor,
    *,
    ridge: float = 0.0,
    cross: Tensor | None = None,
    target_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The map V z_J + b that comes nearest to W z, from moments about the mean.

    With V = W_J alone in place of the best V, b is the bias that FLAP (arXiv:2312.11983) adds: b = W_J' mean_J'.

    Args:
        W, C, kept, ridge, cross: as in `column_least_squares`, C and cross not centred.
        mean: E[z^] [n].
        target_mean: E[z] [n], beside `cross`; None: that of z^.

    Returns:
        V [m, k] and b [m], float64.
    """
    W, mean = matrix("W", W).double(), mean.double()
    wanted = mean if target_mean is None else target_mean.double()
    centred = C.double() - torch.outer(mean, mean)
    varies = (centred.diagonal() > CONSTANT * C.diagonal()).double()  # what is constant explains nothing but the bias
    centred = centred * varies * varies[:, None]
    if cross is not None:
        cross = (cross.double() - torch.outer(wanted, mean)) * varies
    V = column_least_squares(W, centred, kept, ridge=ridge, cross=cross)
    return V, W @ wanted - V @ mean[kept]


def encoded_least_squares(W: Tensor, C: Tensor, E: Tensor, start: Tensor, *, ridge: float = 0.0) -> Tensor:
    """The matrix V for which V E z comes nearest to W z, for any encoder E; columns of the identity make a selection.

    Args:
        W: [m, n].
        C: E[z z^T] [n, n].
        E: encoder [k, n].
        start: V [m, k] towards which directions that C has not seen, and the ridge, pull.
        ridge: relative to the mean of the diagonal of E C E^T.

    Returns:
        V [m, k] float64.
    """
    W, C, E, start = W.double(), metric("C", C, W.shape[1]).double(), E.double(), start.double()
    coded = E @ C
    moment = coded @ E.T
    missing = W @ coded.T - start @ moment
    moment = (moment + moment.T) / 2
    moment.diagonal().add_(_damping(moment, ridge))
    return start + solve_psd(moment, missing.T).T


def selection_loss(
    W: Tensor, C: Tensor, kept: Tensor, V: Tensor, bias: Tensor | None = None, mean: Tensor | None = None
) -> float:
    """E || W z - V z_J - b ||^2.

    Args:
        W: [m, n].
        C: E[z z^T] [n, n].
        kept: int64 [k].
        V: [m, k].
        bias: b [m], None: none.
        mean: E[z] [n], needed beside a bias.
    """
    D = W.double().clone()
    D[:, kept] -= V.double()
    loss = float(((D @ C.double()) * D).sum())
    if bias is not None:
        assert mean is not None
        loss += float(bias.double() @ (bias.double() - 2 * (D @ mean.double())))
    return loss


def complement(kept: Tensor, n: int) -> Tensor:
    """The indices in range(n) that are not in `kept`, ascending."""
    left = torch.ones(n, dtype=torch.bool, device=kept.device)
    left[kept] = False
    return left.nonzero().flatten()


def damped_inverse(C: Tensor, ridge: float) -> Tensor:
    """(C + ridge mean(diag C) I)^-1 [n, n] float64, whose diagonal the scores below are made of.

    A C that is singular up to rounding is decomposed: eigenvalues that are negative count as zero.

    Raises:
        CorankError: ridge is not positive, so that the inverse of a singular moment would not exist.
    """
    if not ridge > 0:
        raise CorankError(f"ridge must be > 0 here, got {ridge}; 1e-8 is next to none.")
    C = metric("C", C, len(C)).double()
    rho = _damping(C, ridge)
    if rho == 0:  # nothing was ever seen: all alike
        return torch.eye(len(C), dtype=torch.float64, device=C.device)
    damped = C.clone()
    damped.diagonal().add_(rho)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) == 0:
        return torch.cholesky_inverse(factor)
    values, vectors = torch.linalg.eigh(C)
    return (vectors / (values.clamp_min(0) + rho)) @ vectors.T


def ridge_leverage(C: Tensor, ridge: float = 1e-4) -> Tensor:
    """Ridge leverage scores [C (C + rho I)^-1]_ii = 1 - rho [(C + rho I)^-1]_ii, rho = ridge * mean(diag C).

    Args:
        C: second moment [n, n].
        ridge: the order is that of -[C^-1]_ii as it goes to zero, that of C_ii as it grows.

    Returns:
        float64 [n] in [0, 1].
    """
    rho = _damping(C, ridge)
    return (1 - rho * damped_inverse(C, ridge).diagonal()).clamp(0, 1)


def removal_losses(W: Tensor, C: Tensor, size: int = 1, ridge: float = 1e-8) -> Tensor:
    """What removing each unit alone costs, with the others compensating: tr(W_G ([C^-1]_GG)^-1 W_G^T).

    Args:
        W: [m, n].
        C: second moment [n, n].
        size: columns of a unit, which are neighbours.
        ridge: relative damping of C.

    Returns:
        float64 [n / size].
    """
    W, K = matrix("W", W).double(), damped_inverse(C, ridge)
    if size == 1:
        return W.square().sum(0) / K.diagonal()
    units = len(K) // size
    losses = [W.new_zeros(())] * units
    for u in range(units):
        G = slice(u * size, (u + 1) * size)
        losses[u] = (solve_psd(K[G, G], W[:, G].T) * W[:, G].T).sum()
    return torch.stack(losses)


def greedy_removal(W: Tensor, C: Tensor, keep: int, size: int = 1, ridge: float = 1e-8) -> Tensor:
    """The units that stay when the cheapest is removed, the others take over what they can, and so on.

    This is the Optimal Brain Surgeon on columns. Selections are nested: what stays at a smaller `keep` stays at a larger.

    Args:
        W: [m, n].
        C: second moment [n, n].
        keep: units that stay.
        size: columns of a unit, which are neighbours.
        ridge: relative damping of C.

    Returns:
        int64 [keep], ascending.

    Raises:
        CorankError: keep is not between 0 and the number of units.
    """
    units = W.shape[1] // size
    if not 0 <= keep <= units:
        raise CorankError(f"Between 0 and {units} units can stay here, got {keep}.")
    gone = removal_order(W, C, units - keep, size, ridge)
    return complement(gone, units)


def removal_order(
    W: Tensor, C: Tensor, count: int, size: int = 1, ridge: float = 1e-8, R: Tensor | None = None
) -> Tensor:
    """The first `count` units that greedy removal takes, in its order: int64 [count].

    Args:
        W, C, size, ridge: as in `greedy_removal`.
        count: how many.
        R: metric of the outputs [m, m], None for the identity: what is lost is then tr(R E[e e^T]) of the error e.
    """
    K, M = damped_inverse(C, ridge), matrix("W", W).double()
    M = M.T @ (M if R is None else metric("R", R, len(M)).double() @ M)
    return _columns(K, M, count) if size == 1 else _groups(K, M, count, size)


def _columns(K: Tensor, M: Tensor, count: int) -> Tensor:
    """One column after another. K is the inverse, M = W^T W; both are updated, a panel of removals at a time.

    With c = K[:, r] / K_rr a removal makes K - k_r c^T of the inverse and W - W_r c^T of W. After a panel the removed rows
    and columns are dropped, which makes the whole a third of the work.
    """
    left = torch.arange(len(K), device=K.device)
    order: list[Tensor] = []
    while len(order) < count:
        n, width = len(K), min(PANEL, count - len(order))
        inverse, energy = K.diagonal().clone(), M.diagonal().clone()
        alive = torch.ones(n, dtype=torch.bool, device=K.device)
        P, A, B = (K.new_zeros(width, n) for _ in range(3))  # K - P^T P, M - A^T B - B^T A
        for t in range(width):
            r = torch.where(alive, energy / inverse, torch.inf).argmin()
            k = K[r] - P[:t, r] @ P[:t]  # K and M are symmetric: rows lie together in memory
            m = M[r] - B[:t, r] @ A[:t] - A[:t, r] @ B[:t]
            P[t] = k / k[r].sqrt()
            A[t] = k / k[r]
            B[t] = m - A[t] * (m[r] / 2)
            alive[r] = False
            inverse = torch.where(alive, inverse - P[t].square(), torch.ones_like(inverse))
            energy = energy - 2 * A[t] * B[t]
            order.append(left[r])
        P, A, B, left = P[:, alive], A[:, alive], B[:, alive], left[alive]
        K = torch.addmm(K[alive][:, alive], P.T, P, alpha=-1)
        cross = A.T @ B
        M = M[alive][:, alive] - cross - cross.T
    return torch.stack(order) if order else torch.empty(0, dtype=torch.long, device=K.device)


def _groups(K: Tensor, M: Tensor, count: int, size: int) -> Tensor:
    """The same for units of several columns, with the exact joint loss of a unit as its score."""
    left, order = list(range(len(K) // size)), []
    for _ in range(count):
        slices = {u: slice(u * size, (u + 1) * size) for u in left}
        losses = {u: float(solve_psd(K[G, G], M[G, G]).trace()) for u, G in slices.items()}
        gone = min(losses, key=losses.__getitem__)
        G = slices[gone]
        c = solve_psd(K[G, G], K[G])  # [size, n]
        K = K - K[:, G] @ c
        cross = M[:, G] @ c
        M = M - cross - cross.T + c.T @ M[G, G] @ c
        left.remove(gone)
        order.append(gone)
    return torch.tensor(order, dtype=torch.long, device=K.device)
