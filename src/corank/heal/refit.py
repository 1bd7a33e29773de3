"""The best values of stored factors for a target, in closed form: what training them would converge to.

    min over the free factors of  || (W~ - W') H^(1/2) ||_F^2

W~ is what the matrix should be (`corank.linalg.retarget`), H the second moment of what it will read. One factor at a time
is a least-squares problem, solved exactly from H alone, also where H or the factors are rank deficient; no inverse is
formed but at pivots that are far from dependent. Structure is kept: pivots, columns and rows of a CUR, and bases that others read.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.factors import CUR, ColumnPivoted, Factors, LowRank, RowPivoted
from corank.factors.pivots import complement
from corank.factors.shared import SharedLowRank
from corank.linalg import alternate, link, refit_output
from corank.linalg.roots import solve_psd

LARGEST = 100.0
"""Combinations of stored rows or columns are not allowed to be larger."""


def refitted(factors: Factors, target: Tensor, H: Tensor, *, basis: bool = True, steps: int = 2) -> Factors:
    """The factors with their free parts refitted, each exactly for the others: the objective never rises.

    Args:
        factors: what is stored, W' [m, n].
        target: W~ [m, n].
        H: [n, n], positive semi-definite.
        basis: the input factor of a low-rank pair may move as well; False if others read it.
        steps: rounds, where there are two free parts.

    Returns:
        factors of the same kind, rank and pivots, in float64.

    Raises:
        CorankError: a kind that has no closed form here.
    """
    wide, goal, H = factors.astype(torch.float64), target.double(), H.double()
    if isinstance(wide, CUR):
        return replace(wide, M=link(wide.C, goal, wide.R, H))
    if isinstance(wide, SharedLowRank) or (isinstance(wide, LowRank) and not basis):
        return replace(wide, B=refit_output(goal @ H, wide.A, H))
    if isinstance(wide, LowRank):
        return LowRank(*alternate(goal, wide.A, H, steps=steps))
    if isinstance(wide, RowPivoted):
        return _row_pivoted(wide, goal, H, steps)
    if isinstance(wide, ColumnPivoted):
        return _column_pivoted(wide, goal, H, steps)
    raise CorankError(f"Factors of the kind {factors.kind} have no closed form to refit them by.")


def _row_pivoted(factors: RowPivoted, goal: Tensor, H: Tensor, steps: int) -> RowPivoted:
    """The refitted pair in terms of the same rows: B A = (B P^-1)(P A) with P = B[pivots].

    Where these rows of the refitted matrix (nearly) depend on each other, the stored parts are refitted one by one.
    """
    pivots, others = factors.pivots.long(), complement(factors.pivots, factors.shape[0])
    B, A = alternate(goal, factors.rows, H, steps=steps)
    rest = _solved(B[pivots].T, B[others].T)
    if rest is not None:
        return replace(factors, rows=B[pivots] @ A, rest=rest.T)
    for _ in range(steps):
        factors = replace(factors, rest=refit_output(goal[others] @ H, factors.rows, H))
        B, _ = factors.pair()
        factors = replace(factors, rows=solve_psd(B.T @ B, B.T @ goal))
    return factors


def _column_pivoted(factors: ColumnPivoted, goal: Tensor, H: Tensor, steps: int) -> ColumnPivoted:
    """The same with columns: B A = (B P)(P^-1 A) with P = A[:, pivots]; or (W~ - C E_J) = C T E_others for T, part by part."""
    n = factors.shape[1]
    pivots, others = factors.pivots.long(), complement(factors.pivots, n)
    B, A = alternate(goal, factors.pair()[1], H, steps=steps)
    rest = _solved(A[:, pivots], A[:, others])
    if rest is not None:
        return replace(factors, columns=B @ A[:, pivots], rest=rest)
    selection = torch.eye(n, dtype=goal.dtype, device=goal.device)[others]
    for _ in range(steps):
        columns = refit_output(goal @ H, factors.pair()[1], H)
        left = goal.clone()
        left[:, pivots] -= columns
        factors = replace(factors, columns=columns, rest=link(columns, left, selection, H))
    return factors


def _solved(P: Tensor, Y: Tensor) -> Tensor | None:
    """P^-1 Y [k, p] for P [k, k]; None if its entries would be large enough to lose the precision they are stored in."""
    solution, info = torch.linalg.solve_ex(P, Y)
    small = solution.numel() == 0 or float(solution.abs().max()) <= LARGEST  # not, if it is NaN
    return solution if int(info) == 0 and small else None
