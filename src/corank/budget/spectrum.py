"""The spectrum behind a curve: what each component contributes to the energy."""

from __future__ import annotations

import math

import numpy as np

from corank.budget.curve import Curve


def energies(curve: Curve) -> np.ndarray:
    """Energy of every component, the squared singular values if the curve is a discarded energy.

    The energy of a component is what the loss falls by when its rank is added. Between ranks the curve does not list,
    the fall is shared evenly; what is left at its last rank goes to the ranks behind it, evenly too. The components up to
    its first rank are not known; being the largest, they count as much as the largest that is.

    Returns:
        float64 [min(m, n)], not negative, falling.
    """
    full = min(curve.shape)
    ranks, loss = curve.ranks, curve.loss
    if not len(ranks):
        return np.zeros(full)
    if ranks[-1] < full:
        ranks, loss = np.append(ranks, full), np.append(loss, 0.0)
    falls = np.maximum(-np.diff(np.interp(np.arange(full + 1), ranks, loss)), 0.0)
    falls[: ranks[0]] = falls.max()
    return np.sort(falls)[::-1]


def effective_rank(energy: np.ndarray) -> float:
    """exp of the entropy of the energy shares (Roy and Vetterli 2007): 1 for one component, n for n equal ones.

    Args:
        energy: float64 [p], not negative.

    Returns:
        Between 1 and p; 1 if there is no energy at all.
    """
    if not len(energy) or energy.max() <= 0:
        return 1.0
    share = energy / energy.max()
    share = share[share > 0] / share.sum()
    return math.exp(-float(np.sum(share * np.log(np.maximum(share, np.finfo(np.float64).tiny)))))
