"""One threshold for all sites, against trying every threshold there is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_curves import convex_curve, low_rank, options_of, pivoted, problems, spectrum_curve

from corank.budget import ALLOCATORS, Curve
from corank.budget.threshold import normalised_spectrum

threshold, strs, welore = (ALLOCATORS[name] for name in ("threshold", "strs", "welore"))


def smallest_within(curves, tau, relative):
    """Cheapest (cost, loss) of every site whose loss is at most tau, in parts of the site's largest if relative."""
    chosen = []
    for curve in curves:
        unit = max(curve.loss.max(initial=0), 1e-300) if relative else 1.0
        chosen.append(min(point for point in options_of(curve) if point[1] / unit <= tau))
    return chosen


@pytest.mark.parametrize("relative", [True, False])
@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_the_lowest_threshold_that_fits(relative, problem):
    curves, limit = problem
    ranks = (threshold if relative else strs)(curves, limit)
    taus = {0.0} | {
        loss / (max(curve.loss.max(initial=0), 1e-300) if relative else 1.0)
        for curve in curves
        for _, loss in options_of(curve)
    }
    fitting = [tau for tau in taus if sum(cost for cost, _ in smallest_within(curves, tau, relative)) <= limit]
    for curve, (cost, loss) in zip(curves, smallest_within(curves, min(fitting), relative), strict=True):
        # What the threshold leaves over may lift a site further, but never below what the threshold gives.
        assert curve.cost_at(ranks[curve.site]) >= cost and curve.loss_at(ranks[curve.site]) <= loss
    if sum(cost for cost, _ in smallest_within(curves, min(fitting), relative)) == limit:
        assert [curve.cost_at(ranks[curve.site]) for curve in curves] == [
            cost for cost, _ in smallest_within(curves, min(fitting), relative)
        ]


def test_relative_losses_have_a_unit_each_and_measured_losses_a_common_one():
    steep = spectrum_curve("steep", (30, 30), low_rank, 0.7 ** np.arange(30))
    slow = spectrum_curve("slow", (30, 30), low_rank, 0.9 ** np.arange(30))
    ranks = threshold([steep, slow], 1000)
    assert ranks["slow"] > ranks["steep"] > 0
    assert threshold([steep.weighted(1e6), slow.weighted(1e-9)], 1000) == ranks
    # The relative losses are equal, as far as whole ranks allow.
    levels = [c.loss_at(ranks[c.site]) / c.loss[0] for c in (steep, slow)]
    before = [c.loss_at(ranks[c.site] - 1) / c.loss[0] for c in (steep, slow)]
    assert max(levels) <= min(before)
    swapped = strs([steep.weighted(1e6), slow.weighted(1e-9)], 1000)
    assert swapped == {"steep": None, "slow": 1}  # what dense leaves over is enough for one rank


@pytest.mark.parametrize("name", ["threshold", "strs", "welore"])
@settings(max_examples=25, deadline=None)
@given(gains=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=4))
def test_more_budget_never_takes_a_rank_away(name, gains):
    """With equal steps, where what fits does not depend on the order."""
    curves = [convex_curve(f"s{i}", gain) for i, gain in enumerate(gains)]
    before = [0] * len(curves)
    for limit in range(sum(curve.dense_cost for curve in curves) + 1):
        ranks = ALLOCATORS[name](curves, limit)
        cost = [curve.cost_at(ranks[curve.site]) for curve in curves]
        assert sum(cost) == limit
        assert all(now >= then for now, then in zip(cost, before, strict=True))
        before = cost


def kept(sigma, tau):
    """Components at or above the threshold after min-max normalisation, one by one."""
    low, high = min(sigma), max(sigma)
    return sum(1 for s in sigma if (s - low) / (high - low) >= tau)


@pytest.mark.parametrize("count", [low_rank, pivoted])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_welore_is_one_threshold_on_normalised_singular_values(count, keep):
    rng = np.random.default_rng(3)
    shapes = [(20, 20), (30, 20), (20, 34), (24, 18)]
    sigmas = [
        np.sort(rng.random(min(shape)) ** power)[::-1] + 0.1 for shape, power in zip(shapes, (1, 2, 4, 8), strict=True)
    ]
    curves = [spectrum_curve(f"s{i}", shapes[i], count, sigmas[i] ** 2) for i in range(4)]
    limit = int(keep * sum(m * n for m, n in shapes))

    def stored(tau):
        # A site whose rank would not be smaller in storage stays dense.
        return [min(count(m, n, kept(sigma, tau)), m * n) for (m, n), sigma in zip(shapes, sigmas, strict=True)]

    low, high = 0.0, 1.1  # the paper's way: bisect, here on parameters
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(stored(middle)) <= limit else (middle, high)
    ranks = welore(curves, limit)
    cost = [curve.cost_at(ranks[curve.site]) for curve in curves]
    assert sum(stored(high)) <= sum(cost) <= limit
    assert sum(stored(low)) > limit
    assert all(mine >= theirs for mine, theirs in zip(cost, stored(high), strict=True))
    above = [
        max(min(count(m, n, kept(s, high) + 1), m * n), c)
        for (m, n), s, c in zip(shapes, sigmas, stored(high), strict=True)
    ]
    assert all(mine <= more for mine, more in zip(cost, above, strict=True))  # the rest lifts each by one rank at most


def test_welore_does_not_depend_on_the_size_of_the_weights():
    curves = [spectrum_curve(f"s{i}", (30, 20), low_rank, np.arange(1, 21) ** (1.0 + i)) for i in range(3)]
    ranks = welore(curves, 700)
    assert welore([c.weighted(10.0**i) for i, c in enumerate(curves)], 700) == ranks
    assert ranks["s0"] > ranks["s2"]  # flat spectra lose least


def test_welore_on_spectra_without_a_shape():
    flat = spectrum_curve("flat", (16, 16), low_rank, np.full(16, 0.1))
    assert (normalised_spectrum(flat) == 1).all()
    single = spectrum_curve("single", (1, 9), low_rank, [4.0])
    assert normalised_spectrum(single).tolist() == [1]
    steep = spectrum_curve("steep", (16, 16), low_rank, 0.5 ** np.arange(16))
    assert normalised_spectrum(steep)[[0, -1]].tolist() == [1, 0]
    # All of the flat one is at the threshold 1, with the first component of the other.
    assert welore([flat, steep], 256 + 32) == {"flat": None, "steep": 1}
    ranks = welore(
        [flat, Curve("twin", *[getattr(flat, f) for f in ("shape", "ranks", "loss", "cost", "dense_cost")])], 100
    )
    assert sorted(ranks.values()) == [1, 2]


def test_welore_rounds_ranks_up_to_multiples():
    curve = spectrum_curve("s", (40, 40), low_rank, np.linspace(2, 1, 40) ** 2)
    other = spectrum_curve("t", (40, 40), low_rank, 0.1 ** np.arange(40.0))
    ranks = welore([curve, other], 80 * 12, multiple_of=4)
    assert ranks == {"s": 8, "t": 4}
    assert math.isclose(normalised_spectrum(curve)[8], 31 / 39, rel_tol=1e-6)
