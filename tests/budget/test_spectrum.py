"""The spectrum of a curve, and its effective rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_curves import low_rank, spectrum_curve

from corank.budget import Curve
from corank.budget.spectrum import effective_rank, energies

SPECTRA = st.lists(st.integers(0, 10**6), min_size=1, max_size=30)


@given(SPECTRA)
def test_energies_are_what_the_curve_was_made_of(energy):
    n = len(energy)
    np.testing.assert_array_equal(energies(spectrum_curve("s", (n, n + 2), low_rank, energy)), sorted(energy)[::-1])


def test_what_the_curve_does_not_list_is_shared_evenly():
    thin = Curve.from_count("s", (8, 6), low_rank, [21, 13, 6], ranks=[0, 2, 3])
    assert energies(thin).tolist() == [7, 4, 4, 2, 2, 2]  # 8 over two ranks, 7, and 6 over the three behind the end
    late = Curve.from_count("s", (4, 4), low_rank, [9, 4, 1], ranks=[2, 3, 4])
    assert energies(late).tolist() == [5, 5, 5, 3]  # nobody knows the first two; they are the largest
    rising = Curve.from_count("s", (3, 3), low_rank, [4, 6, 1, 1])
    assert energies(rising).tolist() == [5, 0, 0]
    assert energies(Curve("s", (3, 2), [], [], [], 6)).tolist() == [0, 0]


def test_effective_rank_of_known_spectra():
    assert effective_rank(np.array([5.0, 0, 0])) == 1
    assert effective_rank(np.full(7, 0.3)) == pytest.approx(7)
    assert effective_rank(np.zeros(4)) == 1
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    # Shares (1 - x) x^i: the entropy is -log(1 - x) - x log(x) / (1 - x).
    x = 0.9
    assert effective_rank(x ** np.arange(400)) == pytest.approx(math.exp(-math.log(1 - x) - x / (1 - x) * math.log(x)))


@settings(max_examples=50)
@given(SPECTRA, st.integers(-900, 900))
def test_effective_rank_has_no_unit_and_is_at_most_the_rank(energy, power):
    energy = np.array(energy, dtype=float)
    rank = effective_rank(energy)
    assert 1 - 1e-12 <= rank <= max((energy > 0).sum(), 1) * (1 + 1e-12)
    assert effective_rank(energy * 2.0**power) == rank
    assert effective_rank(np.append(energy, 0.0)) == pytest.approx(rank)
