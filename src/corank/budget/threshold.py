"""Allocators with one threshold for all sites: whatever is above it anywhere is kept.

The threshold is found exactly: lowering it raises the sites one step at a time in the order of what they need most, so
the steps of all sites are sorted once and taken as long as they fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from corank.budget.curve import Curve
from corank.budget.options import Options, climb, prepare, ranks_of, total_cost, worthwhile
from corank.budget.spectrum import energies

# Singular values that differ by less than this part of the largest are equal: a flat spectrum has no shape to speak of.
_FLAT = 1e-9


def threshold(
    curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1
) -> dict[str, int | None]:
    """The same relative loss for every site: the smallest rank whose loss is at most tau times the site's energy.

    tau is the least that fits; where it falls between two steps, those that still fit are taken in the same order.

    Args:
        curves: one per site; the loss is relative to the largest of the curve, so its unit does not matter.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).

    Returns:
        site -> rank, or None for dense. Apart from those last steps no rank falls as the limit grows.

    Raises:
        CorankError: as in `lagrange`.
    """
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    whole = [max(float(curve.loss.max(initial=0.0)), np.finfo(np.float64).tiny) for curve in curves]
    needs = [option.loss / most for option, most in zip(options, whole, strict=True)]
    return ranks_of(curves, options, _lowest_threshold(options, needs, limit))


def strs(curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1) -> dict[str, int | None]:
    """The same loss for every site, in the currency of the curves (ASVD's truncation rank search).

    Yuan et al., "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    arXiv:2312.05821: every site takes its smallest rank whose loss is under one threshold, or stays dense. There the
    loss is the measured perplexity of the model with that site alone truncated; here it is whatever the curves hold.

    Args:
        curves: one per site; losses of different sites are compared, so they must be in one currency.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).

    Returns:
        site -> rank, or None for dense.

    Raises:
        CorankError: as in `lagrange`.
    """
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    return ranks_of(curves, options, _lowest_threshold(options, [option.loss for option in options], limit))


def welore(curves: Sequence[Curve], limit: int, *, floor: float = 0.0, multiple_of: int = 1) -> dict[str, int | None]:
    """One threshold on the singular values, min-max normalised for each site (WeLore).

    Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    arXiv:2407.11239. Every site keeps its components with (s - min) / (max - min) at or above the threshold; a site
    whose rank would not be smaller than dense in storage stays dense. The paper sets the threshold for a mean
    reduction of *ranks*; here it is the lowest that meets the budget of parameters. The singular values of a site are
    the roots of the energies of its curve; those of a flat spectrum all count as 1.

    Args:
        curves: one per site; the unit of the loss does not matter.
        limit: stored values allowed over all sites.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this, rounded up (full rank and dense excepted).

    Returns:
        site -> rank, or None for dense.

    Raises:
        CorankError: as in `lagrange`.
    """
    options = worthwhile(prepare(curves, limit, floor, multiple_of))
    needs = [_largest_missing(normalised_spectrum(c), option.rank) for c, option in zip(curves, options, strict=True)]
    return ranks_of(curves, options, _lowest_threshold(options, needs, limit))


def normalised_spectrum(curve: Curve) -> np.ndarray:
    """Singular values (roots of the energies) mapped to [0, 1], the largest to 1. float64 [min(m, n)], falling."""
    sigma = np.sqrt(energies(curve))
    most, least = float(sigma[0]), float(sigma[-1])
    if most - least <= _FLAT * most:
        return np.ones(len(sigma))
    return (sigma - least) / (most - least)


def _largest_missing(spectrum: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """For every option the largest singular value it leaves out, 0 if none. Dense, which comes last, leaves out none."""
    return np.append(spectrum, 0.0)[np.where(ranks < 0, len(spectrum), ranks)]


def _lowest_threshold(options: Sequence[Options], needs: Sequence[np.ndarray], limit: int) -> list[int]:
    """Positions: every site its cheapest option whose need is within the lowest threshold that fits.

    Args:
        options: of each site.
        needs: for each site float64 [J], never rising; the threshold above which an option is enough.
        limit: stored values allowed over all sites.
    """
    extra = [np.diff(option.cost) for option in options]
    taken = climb(extra, [-need[:-1] for need in needs], limit - total_cost(options, [0] * len(options)))
    return taken.tolist()
