"""Bayesian optimization of a few shares: one for every kind of matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from corank.budget.curve import Curve
from corank.budget.options import Options, nearest_below, prepare, ranks_of, worthwhile
from corank.budget.shares import divide
from corank.errors import CorankError

Judge = Callable[[Mapping[str, int | None]], float]
"""What a whole choice (site -> rank, None for dense) loses."""

LEAST = 0.2
"""Smallest share of a kind of matrix before all are scaled to the budget."""
START = {"qk": 0.5, "o": 0.5, "gate": 0.8, "up": 0.8, "down": 0.8}
"""The paper's first trial; what it does not name begins at 1 (it leaves the value projections alone)."""
TOGETHER = {"q": "qk", "k": "qk"}
"""Roles that have one share in common."""


def bolaco(
    curves: Sequence[Curve],
    limit: int,
    *,
    floor: float = 0.0,
    multiple_of: int = 1,
    judge: Judge | None = None,
    trials: int = 10,
    seed: int = 0,
) -> dict[str, int | None]:
    """Every kind of matrix keeps a share of its parameters, the same in all layers; the shares are searched (Bolaco).

    Ji et al., "Adaptive Feature-based Low-Rank Compression of Large Language Models via Bayesian Optimization", Findings
    of EMNLP 2024, arXiv:2405.10616. A Gaussian process models what the judge says of whole choices and proposes the
    next. Proposals are proportions: scaled by one factor, and capped at dense, they meet the budget, so that no trial
    is wasted on a constraint; real shares become ranks by largest remainder. The uniform choice is the first trial, the paper's start the second.

    Args:
        curves: one per site; their roles say what has a share in common (q and k do).
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).
        judge: measures a choice; None: the sum of the curves' losses.
        trials: choices to try.
        seed: of the search.

    Returns:
        the best choice tried: site -> rank, or None for dense.

    Raises:
        CorankError: as in `lagrange`, or the optional package is missing.
    """
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    kinds = [TOGETHER.get(curve.role, curve.role) for curve in curves]
    names = sorted(set(kinds))
    dense = np.array([float(curve.dense_cost) for curve in curves])
    seen: dict[tuple[int, ...], float] = {}

    def loss(shares: Mapping[str, float]) -> float:
        chosen = within(options, np.array([shares[kind] for kind in kinds]), dense, limit)
        if chosen not in seen:
            at = list(chosen)
            ranks = ranks_of(curves, options, at)
            predicted = math.fsum(float(o.loss[i]) for o, i in zip(options, at, strict=True))
            seen[chosen] = predicted if judge is None else judge(ranks)
        return seen[chosen]

    even = dict.fromkeys(names, 1.0)
    loss(even)
    if len(names) > 1 and trials > 1:
        _search(loss, [even, {name: START.get(name, 1.0) for name in names}], names, trials, seed)
    best = min(seen, key=lambda chosen: (seen[chosen], chosen))
    return ranks_of(curves, options, list(best))


def within(options: Sequence[Options], shares: np.ndarray, dense: np.ndarray, limit: int) -> tuple[int, ...]:
    """Positions of the choice in these proportions that meets the budget.

    Args:
        options: of each site.
        shares: float64 [sites], parts of the dense cost, up to a common factor.
        dense: float64 [sites], the dense costs.
        limit: stored values allowed over all sites.
    """
    if not options:
        return ()
    low, high = (np.array([float(option.cost[end]) for option in options]) for end in (0, -1))
    meant = divide(float(limit), shares * dense, low, high)
    return tuple(nearest_below(options, meant, limit))


def _search(
    loss: Callable[[Mapping[str, float]], float],
    first: Sequence[Mapping[str, float]],
    names: Sequence[str],
    trials: int,
    seed: int,
) -> None:
    try:
        import optuna
    except ImportError:
        raise CorankError("allocate=bolaco needs an optional package: pip install 'corank[train]'.") from None
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)
        study = optuna.create_study(sampler=sampler)
        for shares in first:
            study.enqueue_trial(dict(shares))

        def objective(trial: Any) -> float:
            value = loss({name: trial.suggest_float(name, LEAST, 1.0) for name in names})
            return math.log(value) if value > 0 else -1e3  # losses span orders of magnitude

        study.optimize(objective, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(verbosity)
