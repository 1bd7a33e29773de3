"""LEMS: the currency is the divergence of the predictions, measured for each matrix alone.

KFAC-SVD + LEMS (ICML 2026) measures one point of each curve, at 10% of its useful ranks, and takes the divergence to be
proportional to the discarded share of the energy. Here a second point, at 60%, tells how fast it really falls:

    KL(k) = c * (share of the energy that rank k discards)^p,   through both points, p within [0.5, 2]

which is what the sites are then compared by, on the lower hull of every curve and with the dense option.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from corank.budget import Curve
from corank.probing.probe import Prober

POINTS = (0.1, 0.6)
"""Where a curve is measured, in parts of the largest rank that is smaller than dense."""
EXPONENTS = (0.5, 2.0)


def measured(prober: Prober, curves: Sequence[Curve]) -> list[Curve]:
    """The curves with losses in nats per token, from two probes of every site."""
    wanted = [probe_ranks(curve) for curve in curves]
    changes = [{curve.site: rank} for curve, ranks in zip(curves, wanted, strict=True) for rank in ranks]
    found = iter(prober.effects(changes))
    return [through(curve, ranks, [next(found).kl for _ in ranks]) for curve, ranks in zip(curves, wanted, strict=True)]


def probe_ranks(curve: Curve) -> list[int]:
    """Up to two ranks at which a curve is measured; none if the site can only be dense, or loses nothing anyway."""
    useful = curve.ranks[curve.cost < curve.dense_cost]
    if not len(useful) or not curve.loss.any():
        return []
    at = np.searchsorted(useful, [share * useful[-1] for share in POINTS])
    return sorted({int(useful[i]) for i in np.maximum(at, min(1, len(useful) - 1))})


def through(curve: Curve, ranks: Sequence[int], kl: Sequence[float]) -> Curve:
    """The curve c * share^p through measured points.

    Args:
        curve: its loss tells the discarded share of every rank.
        ranks: one or two, ascending.
        kl: nats per token at these ranks.
    """
    if not len(ranks):
        return replace(curve, loss=np.zeros(len(curve.loss)) if not curve.loss.any() else curve.loss)
    share = curve.loss / curve.loss.max()
    points = [
        (float(share[np.searchsorted(curve.ranks, rank)]), _bounded(v)) for rank, v in zip(ranks, kl, strict=True)
    ]
    points = [(s, v) for s, v in points if s > 0 and v > 0]
    if not points:
        return replace(curve, loss=np.zeros(len(share)))
    power = 1.0
    if len(points) == 2 and points[0][0] > points[1][0]:
        (s1, v1), (s2, v2) = points
        power = min(max(math.log(v1 / v2) / math.log(s1 / s2), EXPONENTS[0]), EXPONENTS[1])
    scale = math.exp(math.fsum(math.log(v) - power * math.log(s) for s, v in points) / len(points))
    return replace(curve, loss=scale * share**power)


def _bounded(kl: float) -> float:
    """Noise below zero is zero, and a model that overflows is as bad as one whose predictions are arbitrary."""
    return min(max(kl, 0.0), 1e3)
