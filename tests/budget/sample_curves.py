"""Curves to allocate over, and exact answers straight from the definitions."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from corank.budget import Curve


def low_rank(m, n, k):
    return k * (m + n)


def pivoted(m, n, k):
    return k * (m + n - k) + k


def pivoted_values(m, n, k):
    """Without the k indices."""
    return k * (m + n - k)


def cur(m, n, r):
    return r * (m + n) + r * r


KINDS = {"low_rank": low_rank, "pivoted": pivoted, "cur": cur}


def spectrum_curve(site, shape, count, energy, **where):
    """Discarded energy at every rank."""
    energy = np.sort(np.asarray(energy, dtype=np.float64))[::-1]
    loss = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return Curve.from_count(site, shape, count, loss, **where)


def convex_curve(site, gains, step=1):
    """Equal steps with falling gains, dense being the last of them: all points are on the hull."""
    gains = np.sort(np.asarray(gains, dtype=np.float64))[::-1]
    loss = np.append(np.cumsum(gains[::-1])[::-1], 0.0)
    p = len(gains)
    return Curve(site, (p, p), np.arange(p), loss[:-1], step * np.arange(p), step * p)


def total_cost(curves, ranks):
    return sum(curve.cost_at(ranks[curve.site]) for curve in curves)


def total_loss(curves, ranks):
    return math.fsum(curve.loss_at(ranks[curve.site]) for curve in curves)


def options_of(curve, multiple_of=1):
    """(cost, loss) of all admissible choices, straight from the definition."""
    points = [(curve.dense_cost, 0.0)]
    for rank, cost, loss in zip(curve.ranks, curve.cost, curve.loss, strict=True):
        whole = rank % multiple_of == 0 or rank == min(curve.shape)
        if whole and cost < curve.dense_cost:
            points.append((int(cost), float(loss)))
    return points


def least_loss(curves, limit, multiple_of=1):
    """Least loss by dynamic programming over every whole cost up to the limit."""
    best = np.zeros(limit + 1)
    for curve in curves:
        new = np.full(limit + 1, np.inf)
        for cost, loss in options_of(curve, multiple_of):
            if cost <= limit:
                new[cost:] = np.minimum(new[cost:], best[: limit + 1 - cost] + loss)
        best = new
    return best[limit]


def largest_hull_gain(curves, multiple_of=1):
    """Largest loss saved by one edge of a lower hull; hull found by trying every pair of points."""
    largest = 0.0
    for curve in curves:
        points = sorted(options_of(curve, multiple_of))
        at = min(points)
        while True:
            later = [p for p in points if p[0] > at[0] and p[1] < at[1]]
            if not later:
                break
            nxt = min(later, key=lambda p, at=at: ((p[1] - at[1]) / (p[0] - at[0]), -p[0]))
            largest = max(largest, at[1] - nxt[1])
            at = nxt
    return largest


@st.composite
def problems(draw, max_side=6, max_sites=5):
    curves = []
    for index in range(draw(st.integers(1, max_sites))):
        m, n = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
        count = KINDS[draw(st.sampled_from(sorted(KINDS)))]
        p = min(m, n)
        where = {
            "role": draw(st.sampled_from(["", "q", "k", "v"])),
            "layer": index,
            "importance": draw(st.floats(0, 10)),
        }
        if draw(st.booleans()):
            energy = draw(st.lists(st.integers(0, 50), min_size=p, max_size=p))
            curves.append(spectrum_curve(f"s{index}", (m, n), count, energy, **where))
        else:  # any shape at all: not monotone, not convex
            loss = draw(st.lists(st.integers(0, 100), min_size=p + 1, max_size=p + 1))
            curves.append(Curve.from_count(f"s{index}", (m, n), count, loss, **where))
    dense = sum(curve.dense_cost for curve in curves)
    return curves, draw(st.integers(0, dense + 3))


def check_choices(curves, ranks, limit, multiple_of=1):
    assert set(ranks) == {curve.site for curve in curves}
    assert total_cost(curves, ranks) <= limit
    for curve in curves:
        rank = ranks[curve.site]
        if rank is not None:
            assert rank % multiple_of == 0 or rank == min(curve.shape)
            assert curve.cost_at(rank) < curve.dense_cost
