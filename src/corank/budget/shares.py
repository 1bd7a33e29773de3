"""Closed-form allocators: every site's share of the parameters follows from a score of its curve.

Each gives a role its uniform part of the budget and divides that among the sites of the role, within what a site can
use: at least its cheapest option, at most the cheapest one that loses nothing more. What clamping frees goes to the
others in the same proportion. Shares are of parameters; with two factors, k (m + n), the papers' shares of ranks are
the same thing. Real shares become ranks by largest remainder, until no next rank of any site fits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from corank.budget.curve import Curve
from corank.budget.options import Options, nearest_below, options_of, prepare, ranks_of, uniform_choice, worthwhile
from corank.budget.spectrum import effective_rank, energies
from corank.errors import CorankError

# Losses below this part of the largest of their role are rounding noise; a logarithm must not take them at their word.
_NOISE = 1e-12


def inv_log_loss(
    curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1
) -> dict[str, int | None]:
    """What is removed from a site is proportional to 1 / log of its loss at the uniform rank (SVD-LLM V2).

    Wang et al., "SVD-LLM V2: Optimizing Singular Value Truncation for Large Language Model Compression", NAACL 2025,
    arXiv:2503.12340. Within a role of g sites of which the fraction R is removed, site i loses the fraction
    g R s_i / sum(s) of its parameters, s_i = 1 / log(e L_i / L_min), with L_i the root of the loss at the uniform rank
    and L_min the least of the role. The paper writes 1 / log(L_i), which is negative or infinite for small L and
    depends on the unit of the data; relative to L_min it does neither.

    Args:
        curves: one per site.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).

    Returns:
        site -> rank, or None for dense. Equal losses within roles give the uniform ranks.

    Raises:
        CorankError: as in `lagrange`.
    """
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    loss = _uniform_losses(curves, limit, multiple_of)
    room = _Room.of(curves, options)
    shares = np.empty(len(curves))
    for members, total in room.by_role(curves, limit):
        low, high, dense = room.low[members], room.high[members], room.dense[members]
        removed = divide(dense.sum() - total, _inverse_log(loss[members]) * dense, dense - high, dense - low)
        shares[members] = dense - removed
    return ranks_of(curves, options, nearest_below(options, shares, limit))


def d_rank(
    curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1, beta: float = 0.3
) -> dict[str, int | None]:
    """Ranks proportional to sqrt(R / omega), with the effective rank R and the cost per rank omega (D-Rank).

    Mi et al., "Layer-wise dynamic rank for compressing large language models", arXiv:2509.25622: within a role, the
    least sum of R_i / k_i under sum of omega_i k_i = budget. R is the exponential of the entropy of the energy shares.
    Then every q and k gives up the fraction ``beta`` of its share, which the v matrices receive in equal amounts (in
    parameters, as their sizes differ with grouped-query attention); what they cannot use goes back to the givers.

    Args:
        curves: one per site.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).
        beta: fraction of the shares of q and k that goes to v, in [0, 1]; nothing moves unless all three roles exist.

    Returns:
        site -> rank, or None for dense.

    Raises:
        CorankError: as in `lagrange`, or ``beta`` is out of range.
    """
    if not 0 <= beta <= 1:
        raise CorankError(f"beta={beta} is not a fraction; the paper moves 0.3 to 0.4 of the ranks of q and k.")
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    room = _Room.of(curves, options)
    weight = np.array([(effective_rank(energies(curve)) * _cost_per_rank(curve)) ** 0.5 for curve in curves])
    shares = np.empty(len(curves))
    for members, total in room.by_role(curves, limit):
        shares[members] = divide(total, weight[members], room.low[members], room.high[members])
    role = np.array([curve.role for curve in curves])
    givers, takers = np.flatnonzero(np.isin(role, ("q", "k"))), np.flatnonzero(role == "v")
    if {"q", "k", "v"} <= set(role.tolist()):
        given = np.minimum(beta * shares[givers], np.maximum(shares[givers] - room.low[givers], 0.0))
        before, pool = shares[takers], given.sum()
        after = divide(before.sum() + pool, np.ones(len(takers)), before, room.high[takers], start=before)
        used = min((after - before).sum() / pool, 1.0) if pool > 0 else 0.0
        shares[takers] = after
        shares[givers] -= given * used
    return ranks_of(curves, options, nearest_below(options, shares, limit))


def swift_svd(
    curves: Sequence[Curve],
    limit: int,
    *,
    floor: float = 0.0,
    multiple_of: int = 1,
    alpha: float = 0.5,
    delta: float = 0.5,
) -> dict[str, int | None]:
    """A fixed part of the uniform share for every site; the rest by importance and loss (Swift-SVD).

    Qi et al., "Swift-SVD: Theoretical Optimality Meets Practical Efficiency in Low-Rank LLM Compression",
    arXiv:2604.01609. Within a role, k_i = delta k_uniform + pool s_i / sum(s) with the score
    s_i = beta_i^alpha ln(e + err_i)^(1 - alpha), where beta in [1, 2] is one plus the min-max normalised importance
    of the layer and err_i the relative error at the uniform rank (root of the loss over that of the whole energy).

    Args:
        curves: one per site, with their layer's `importance`.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).
        alpha: 1 looks at importance alone, 0 at the loss alone; the paper tries 0, 0.1, ... 1 on held-out text.
        delta: part of the uniform share that every site keeps, in [0, 1].

    Returns:
        site -> rank, or None for dense. Equal scores give the uniform ranks.

    Raises:
        CorankError: as in `lagrange`, or ``alpha`` or ``delta`` is out of range.
    """
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 <= value <= 1:
            raise CorankError(f"{name}={value} is outside [0, 1].")
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    room = _Room.of(curves, options)
    whole = np.array([curve.loss.max(initial=0.0) for curve in curves])
    error = np.sqrt(np.divide(_uniform_losses(curves, limit, multiple_of), whole, out=whole * 0, where=whole > 0))
    importance = np.array([curve.importance for curve in curves])
    score = (1 + _min_max(importance)) ** alpha * np.log(np.e + error) ** (1 - alpha)
    shares = np.empty(len(curves))
    for members, total in room.by_role(curves, limit):
        low, high, dense = room.low[members], room.high[members], room.dense[members]
        base = delta * divide(total, dense, low, high)
        shares[members] = divide(total, score[members] * dense, np.maximum(low, base), high, start=base)
    return ranks_of(curves, options, nearest_below(options, shares, limit))


def divide(
    total: float, weight: np.ndarray, low: np.ndarray, high: np.ndarray, start: np.ndarray | float = 0.0
) -> np.ndarray:
    """Split a total in proportion to weights within bounds: ``clip(start + t weight, low, high)`` adding up to it.

    Args:
        total: what to split; below the sum of ``low`` the result is ``low``, above that of ``high`` it is ``high``.
        weight: float64 [N], positive.
        low: float64 [N].
        high: float64 [N], not below ``low``.
        start: float64 [N] or a number.

    Returns:
        float64 [N].
    """

    def at(t: float) -> np.ndarray:
        return np.clip(start + t * weight, low, high)

    # Between the points at which a site reaches a bound the sum is linear in t.
    weight = weight / weight.max()
    knots = np.unique(np.maximum(np.append((low - start) / weight, (high - start) / weight), 0.0))
    after = bisect_right(knots, total, key=lambda t: at(t).sum())
    if after == 0:
        return at(float(knots[0]))
    if after == len(knots):
        return at(float(knots[-1]))
    left, right = at(float(knots[after - 1])), at(float(knots[after]))
    return left + (right - left) * ((total - left.sum()) / (right.sum() - left.sum()))


class _Room(NamedTuple):
    """The least and the most that every site can use, and its dense cost. All float64 [N], in parameters."""

    low: np.ndarray
    high: np.ndarray
    dense: np.ndarray

    @classmethod
    def of(cls, curves: Sequence[Curve], options: Sequence[Options]) -> _Room:
        return cls(
            np.array([option.cost[0] for option in options], dtype=np.float64),
            np.array([option.cost[-1] for option in options], dtype=np.float64),
            np.array([curve.dense_cost for curve in curves], dtype=np.float64),
        )

    def by_role(self, curves: Sequence[Curve], limit: int) -> list[tuple[np.ndarray, float]]:
        """For each role the indices of its sites and its part of the limit, uniform as far as possible."""
        roles: dict[str, list[int]] = {}
        for i, curve in enumerate(curves):
            roles.setdefault(curve.role, []).append(i)
        if not roles:
            return []
        members = [np.array(indices) for indices in roles.values()]
        low, high, dense = (np.array([part[m].sum() for m in members]) for part in self)
        return list(zip(members, divide(limit, dense, low, high).tolist(), strict=True))


def _uniform_losses(curves: Sequence[Curve], limit: int, multiple_of: int) -> np.ndarray:
    options = [options_of(curve, multiple_of) for curve in curves]
    chosen = uniform_choice(options, limit)
    return np.array([max(float(o.loss[at]), 0.0) for o, at in zip(options, chosen, strict=True)])


def _inverse_log(loss: np.ndarray) -> np.ndarray:
    """1 / log(e L / L_min) for L = sqrt(loss); what cannot be told from 0 counts as L_min."""
    measurable = loss[loss > _NOISE * loss.max()]
    if not len(measurable):
        return np.ones(len(loss))
    return 1 / (1 + 0.5 * np.log(np.maximum(loss / measurable.min(), 1.0)))


def _min_max(values: np.ndarray) -> np.ndarray:
    if not len(values) or values.max() == values.min():
        return np.zeros(len(values))
    scaled = values / values.max()
    return (scaled - scaled.min()) / (scaled.max() - scaled.min())


def _cost_per_rank(curve: Curve) -> float:
    """Average over the curve: m + n for two factors."""
    if len(curve.ranks) < 2:
        return 1.0
    return max(float(curve.cost[-1] - curve.cost[0]) / float(curve.ranks[-1] - curve.ranks[0]), 1.0)
