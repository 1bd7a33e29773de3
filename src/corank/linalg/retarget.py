"""Moving the target of a truncation: anchored inputs before it, least-squares refits of the factors after it.

Notation: x is the input of the dense layer, x^ the input the compressed model will really see, H = E[x^
x^^T], C = E[x x^^T], T the desired output. Only second moments are needed, never the activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.linalg.operands import matrix, metric, work_dtype
from corank.linalg.roots import apply_metric, solve_psd


def _ridge(H: Tensor, ridge: float) -> float:
    if ridge < 0:
        raise CorankError(f"ridge must be >= 0, got {ridge}.")
    diagonal = H if H.ndim == 1 else H.diagonal()
    return ridge * float(diagonal.mean()) if diagonal.numel() else 0.0


def _solve_right(Y: Tensor, H: Tensor, rho: float) -> Tensor:
    """Y (H + rho I)^+ for Y [m, n] and H [n, n] or its diagonal [n]; zero where H + rho I is zero."""
    if H.ndim == 1:
        shifted = H + rho
        return torch.where(shifted > 0, Y / torch.where(shifted > 0, shifted, torch.ones_like(shifted)), 0.0)
    shifted = H.clone()
    shifted.diagonal().add_(rho)
    return solve_psd(shifted, Y.T).T


def retarget(W: Tensor, C: Tensor, H: Tensor, mix: float = 1.0, ridge: float = 1e-3) -> Tensor:
    """The matrix W~ that makes W~ x^ imitate the output on dense inputs; truncate W~ under H afterwards.

    W~ = (W ((1 - t) H + t C) + rho W) (H + rho I)^-1 with t = mix and rho = ridge * mean(diag H), evaluated
    as W + t W (C - H) (H + rho I)^+, which is exactly W for C = H and leaves W alone in directions H never
    saw.

    Args:
        W: [m, n].
        C: E[x x^^T] [n, n], or [n] if both moments are diagonal.
        H: E[x^ x^^T] [n, n] positive semi-definite, or [n].
        mix: t; 1 anchors to the dense output W x, 0 keeps the output W x^ on drifted inputs.
        ridge: damping relative to the mean of diag H; it pulls to W, not to zero. 0 is allowed, also for
            singular H.

    Returns:
        W~ [m, n], dtype of W (float64 inside).

    Raises:
        CorankError: shapes that do not fit, NaN or infinity, ridge < 0.

    Source: anchored objective of AA-SVD (arXiv:2604.02119); the mix is that of MPIFA (arXiv:2501.19090).
    """
    matrix("W", W)
    metric("H", H, W.shape[1])
    if C.shape != H.shape:
        raise CorankError(f"C must have the shape of H, {list(H.shape)}, got {list(C.shape)}.")
    C64, H64, W64 = C.double(), H.double(), W.double()
    drift = _solve_right(apply_metric(W64, C64 - H64), H64, _ridge(H64, ridge))
    return (W64 + mix * drift).to(work_dtype(W))


def refit_output(T_cross: Tensor, A: Tensor, H: Tensor) -> Tensor:
    """The best output factor for a given input factor: B = (T X^^T) A^T (A H A^T)^+ minimises E|| t - B A x^
    ||^2.

    Args:
        T_cross: E[t x^^T] [m, n], e.g. W C (anchored) or W H (drifted target).
        A: [k, n].
        H: E[x^ x^^T] [n, n] or [n].

    Returns:
        B [m, k], dtype of A. For a singular A H A^T one of the minimisers.

    Raises:
        CorankError: shapes that do not fit, NaN or infinity.

    Source: SVD-LLM(U) (arXiv:2403.07378), from Gram matrices as in MPIFA (arXiv:2501.19090).
    """
    matrix("A", A)
    metric("H", H, A.shape[1])
    matrix("T_cross", T_cross)
    A64 = A.double()
    moment = apply_metric(A64, H.double()) @ A64.T
    return solve_psd((moment + moment.T) / 2, A64 @ T_cross.double().T).T.to(work_dtype(A))


def refit_input(B: Tensor, T_cross: Tensor, H: Tensor, W: Tensor, ridge: float = 1e-3) -> Tensor:
    """The best input factor for a given output factor, damped towards W.

    A = B^+ (T_cross + rho W) (H + rho I)^-1 with rho = ridge * mean(diag H); it minimises
    E|| t - B A x^ ||^2 + rho || W - B A ||_F^2. Evaluated as B^+ (W + (T_cross - W H) (H + rho I)^+).

    Args:
        B: [m, k], of any rank.
        T_cross: E[t x^^T] [m, n].
        H: E[x^ x^^T] [n, n] or [n].
        W: [m, n], the matrix the damping pulls to.
        ridge: relative to the mean of diag H, >= 0.

    Returns:
        A [k, n], dtype of B.

    Raises:
        CorankError: shapes that do not fit, NaN or infinity, ridge < 0.
    """
    matrix("B", B)
    matrix("W", W)
    metric("H", H, W.shape[1])
    matrix("T_cross", T_cross)
    B64, H64, W64 = B.double(), H.double(), W.double()
    full = W64 + _solve_right(T_cross.double() - apply_metric(W64, H64), H64, _ridge(H64, ridge))
    return (torch.linalg.pinv(B64) @ full).to(work_dtype(B))


def alternate(target: Tensor, A: Tensor, H: Tensor, R: Tensor | None = None, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Fit both factors in turn, each exactly for the other: B = W~ H A^T (A H A^T)^+, then A = (B^T R B)^+ B^T R W~.

    Either one minimises || R^{1/2} (W~ - B A) H^{1/2} ||_F^2 over its factor, so that no step makes it larger; at the
    truncation of W~ under R and H nothing is left to gain. For a desired output T this is E|| R^{1/2} (t - B A x^) ||^2
    up to a constant if W~ H = E[t x^^T], which is what `retarget` solves (under H + rho I: pass that as H).

    Args:
        target: W~ [m, n].
        A: [k, n], the input factor to start from; the output factor comes first.
        H: E[x^ x^^T] [n, n] or [n].
        R: metric of the outputs, [m, m] positive semi-definite or [m]; None: the identity.
        steps: times that both are updated, >= 1.

    Returns:
        B [m, k] and A [k, n], dtype of A.

    Raises:
        CorankError: shapes that do not fit, NaN or infinity, steps < 1.

    Source: adaComp of AdaSVD (arXiv:2502.01403) and the reconstruction of MPIFA (arXiv:2501.19090), from second moments
    alone; the pull of MPIFA towards W lies in W~ here, so that one objective is behind both updates.
    """
    if steps < 1:
        raise CorankError(f"steps must be at least 1, got {steps}.")
    matrix("target", target)
    metric("H", H, target.shape[1])
    goal, inner, H64 = target.double(), A.double(), H.double()
    R64 = None if R is None else metric("R", R, target.shape[0]).double()
    cross = apply_metric(goal, H64)
    outer = goal
    for _ in range(steps):
        outer = refit_output(cross, inner, H64)
        weighted = outer if R64 is None else apply_metric(outer.T, R64).T  # R B
        moment = weighted.T @ outer
        inner = solve_psd((moment + moment.T) / 2, weighted.T @ goal)
    return outer.to(work_dtype(A)), inner.to(work_dtype(A))
