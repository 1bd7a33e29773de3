"""Closed-form shares against the papers' formulas, recomputed here one site at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_curves import low_rank, pivoted, problems, spectrum_curve, total_cost

from corank.budget import ALLOCATORS, Curve, uniform
from corank.budget.shares import divide
from corank.errors import CorankError

inv_log_loss, d_rank, swift_svd = (ALLOCATORS[name] for name in ("inv-log-loss", "d-rank", "swift-svd"))

#: decay of the spectrum of each layer, and size of its weights
DECAY = (0.4, 0.7, 0.5, 1.1, 0.8)
SCALE = (1.0, 30.0, 4.0, 0.2, 9.0)


def layers(role, shape, count=low_rank, scale=SCALE):
    """One site of a role per layer."""
    ranks = np.arange(1, min(shape) + 1)
    return [
        spectrum_curve(f"{role}{i}", shape, count, size**2 * ranks ** (-2 * decay), role=role, layer=i)
        for i, (decay, size) in enumerate(zip(DECAY, scale, strict=True))
    ]


def spectrum(curve):
    return -np.diff(curve.loss)


def cost_of(curves, ranks):
    return total_cost(curves, {curve.site: ranks[curve.site] for curve in curves})


def test_inv_log_loss_is_the_formula_of_the_paper():
    """Removal g R s_i / sum(s) with s = 1 / log(e L / L_min), L = || W X - W' X || at the uniform rank."""
    m, n, keep = 300, 200, 0.7
    curves = layers("q", (m, n))
    limit = int(keep * 5 * m * n)
    even = uniform(curves, limit)
    L = [math.sqrt(curve.loss_at(even[curve.site])) for curve in curves]
    score = [1 / math.log(math.e * one / min(L)) for one in L]
    removed = [5 * (1 - limit / (5 * m * n)) * s / sum(score) for s in score]
    assert sum(removed) == pytest.approx(5 * (1 - keep), abs=1e-3) and max(removed) < 1
    ranks = inv_log_loss(curves, limit)
    for curve, part in zip(curves, removed, strict=True):
        assert abs(ranks[curve.site] - (1 - part) * m * n / (m + n)) < 1
    # The largest loss (layer 1) keeps most, the least (layer 3) least.
    assert max(ranks, key=ranks.get) == "q1" and min(ranks, key=ranks.get) == "q3"


def test_inv_log_loss_clips_what_cannot_be_removed_and_takes_it_from_the_others():
    curves = layers("q", (60, 60), scale=(1.0, 1.0, 1.0, 1e-5, 1.0))
    limit = int(0.3 * 5 * 3600)
    ranks = inv_log_loss(curves, limit)
    assert ranks["q3"] == 0  # the formula would remove several times its size
    assert limit - 120 < total_cost(curves, ranks) <= limit


def test_inv_log_loss_does_not_take_rounding_noise_for_a_loss():
    """A matrix of rank 3, as an eigensolver sees it: by the bare formula almost everything would be removed from it."""
    energy = [2.0, 1.0, 0.5] + [1e-18] * 57
    curves = [
        *(spectrum_curve(f"q{i}", (60, 60), low_rank, np.ones(60), role="q") for i in range(3)),
        spectrum_curve("noisy", (60, 60), low_rank, energy, role="q"),
    ]
    assert inv_log_loss(curves, 4 * 120 * 15) == {"q0": 15, "q1": 15, "q2": 15, "noisy": 15}


@pytest.mark.parametrize("count", [low_rank, pivoted])
def test_inv_log_loss_and_swift_svd_are_uniform_where_nothing_tells_the_sites_apart(count):
    curves = [
        spectrum_curve(f"{role}{i}", shape, count, np.arange(1, min(shape) + 1) ** -0.5, role=role, layer=i)
        for role, shape in (("q", (40, 40)), ("down", (30, 70)))
        for i in range(4)
    ]
    dense = sum(curve.dense_cost for curve in curves)
    for limit in range(dense // 10, dense, dense // 10):
        even = uniform(curves, limit)
        for method in (inv_log_loss, swift_svd):
            ranks = method(curves, limit)
            for same in (curves[:4], curves[4:]):
                above = [(ranks[c.site] or min(c.shape)) - even[c.site] for c in same]
                # Uniform leaves the rounding unspent, and the last pivoted ranks cost less than the first.
                assert min(above) >= 0 and max(above) - min(above) <= 1 and min(above) <= (count is pivoted)
    for rank in (1, 7, 13):
        exact = 4 * curves[0].cost_at(rank)
        assert inv_log_loss(curves[:4], exact) == swift_svd(curves[:4], exact) == {f"q{i}": rank for i in range(4)}


@pytest.mark.parametrize("method", [inv_log_loss, d_rank, swift_svd])
def test_every_role_keeps_its_part_of_the_budget(method):
    groups = {role: layers(role, shape) for role, shape in {"o": (64, 64), "up": (100, 64), "down": (64, 96)}.items()}
    curves = [curve for group in groups.values() for curve in group]
    ranks = method(curves, int(0.35 * sum(curve.dense_cost for curve in curves)))
    for group in groups.values():
        wanted = 0.35 * sum(curve.dense_cost for curve in group)
        assert abs(cost_of(group, ranks) - wanted) <= 5 * (64 + 100)  # within a rank per matrix


def closed_d_rank(group, budget):
    """k = Bud sqrt(R / omega) / sum sqrt(R omega), entropies by hand."""
    weights = []
    for curve in group:
        share = spectrum(curve) / spectrum(curve).sum()
        R = math.exp(-sum(p * math.log(p) for p in share.tolist()))
        weights.append((R, sum(curve.shape)))
    total = sum(math.sqrt(R * omega) for R, omega in weights)
    return [budget * math.sqrt(R / omega) / total for R, omega in weights]


def test_d_rank_is_the_formula_of_the_paper():
    curves = layers("o", (120, 90))
    curves[2:4] = layers("o", (50, 130))[2:4]  # omega differs as well
    limit = int(0.3 * sum(curve.dense_cost for curve in curves))
    ranks = d_rank(curves, limit)
    for curve, k in zip(curves, closed_d_rank(curves, limit), strict=True):
        assert abs(ranks[curve.site] - k) < 1.01


def test_d_rank_minimises_its_own_objective():
    """sum of R / k: no rank moved from one site to another makes it smaller by more than rounding explains."""
    curves = layers("o", (120, 90))
    limit = 5 * 210 * 20
    R = [k**2 for k in closed_d_rank(curves, limit)]  # equal omega: k is proportional to sqrt(R)
    ranks = d_rank(curves, limit)
    k = np.array([ranks[curve.site] for curve in curves])
    assert k.sum() == 100
    best = (np.array(R) / k).sum()
    for i in range(5):
        for j in set(range(5)) - {i}:
            moved = k + 2 * (np.arange(5) == i) - 2 * (np.arange(5) == j)
            assert (np.array(R) / moved).sum() > best


def test_d_rank_moves_a_part_of_q_and_k_to_v():
    groups = {role: layers(role, (100, 80)) for role in "qkvo"}
    curves = [curve for group in groups.values() for curve in group]
    limit = int(0.25 * sum(curve.dense_cost for curve in curves))
    k = {role: closed_d_rank(group, limit / 4) for role, group in groups.items()}
    ranks = d_rank(curves, limit)
    moved = 0.3 * (sum(k["q"]) + sum(k["k"])) / 5
    for i in range(5):
        assert abs(ranks[f"q{i}"] - 0.7 * k["q"][i]) < 1
        assert abs(ranks[f"k{i}"] - 0.7 * k["k"][i]) < 1
        assert abs(ranks[f"v{i}"] - (k["v"][i] + moved)) < 1
        assert abs(ranks[f"o{i}"] - k["o"][i]) < 1
    unmoved = d_rank(curves, limit, beta=0.0)
    assert all(abs(unmoved[f"{role}{i}"] - k[role][i]) < 1 for role in "qkvo" for i in range(5))
    # Without one of the three roles nothing moves.
    without = {site: rank for site, rank in unmoved.items() if not site.startswith("v")}
    assert d_rank([c for c in curves if c.role != "v"], limit * 3 // 4) == pytest.approx(without, abs=1)


def test_d_rank_returns_what_v_cannot_use():
    """With grouped queries v is a quarter of q: it becomes dense and q and k get the rest back."""
    q, k, v = layers("q", (64, 64)), layers("k", (16, 64)), layers("v", (16, 64))
    curves = [*q, *k, *v]
    dense = sum(curve.dense_cost for curve in curves)
    limit = int(0.7 * dense)
    ranks = d_rank(curves, limit)
    assert all(ranks[curve.site] is None for curve in v)
    left = limit - sum(curve.dense_cost for curve in v)
    assert left - 128 < cost_of([*q, *k], ranks) <= left
    # Both givers get the same part of their gift back, so their budgets stay in proportion.
    assert cost_of(q, ranks) / cost_of(k, ranks) == pytest.approx(4, rel=0.05)


def test_swift_svd_is_the_formula_of_the_paper():
    """k = delta k_uniform + pool s / sum(s), s = beta^alpha log(e + err)^(1 - alpha)."""
    m, n = 160, 120
    importance = [3.0, 7.0, 5.0, 3.0, 4.0]
    curves = [
        Curve.from_count(c.site, c.shape, low_rank, c.loss, role="q", importance=one)
        for c, one in zip(layers("q", (m, n)), importance, strict=True)
    ]
    limit = int(0.4 * 5 * m * n)
    even = limit / 5 / (m + n)
    for alpha, delta in ((0.5, 0.5), (0.0, 0.5), (1.0, 0.2), (0.3, 0.0)):
        ranks = swift_svd(curves, limit, alpha=alpha, delta=delta)
        score = []
        for curve, one in zip(curves, importance, strict=True):
            energy = spectrum(curve)
            error = math.sqrt(energy[int(even) :].sum() / energy.sum())
            score.append((1 + (one - 3) / 4) ** alpha * math.log(math.e + error) ** (1 - alpha))
        for curve, s in zip(curves, score, strict=True):
            k = delta * even + (1 - delta) * 5 * even * s / sum(score)
            assert abs(ranks[curve.site] - k) < 1
    assert swift_svd(curves, limit) == swift_svd(curves, limit, alpha=0.5, delta=0.5)
    assert max(ranks, key=ranks.get) == "q1"


def test_swift_svd_with_all_of_the_uniform_share_is_uniform():
    curves = layers("q", (60, 60))
    limit = 5 * 120 * 11
    assert swift_svd(curves, limit, delta=1.0) == uniform(curves, limit)


@pytest.mark.parametrize("unit", [1e-200, 1.0, 1e200])
def test_the_unit_of_importance_does_not_matter(unit):
    curves = layers("q", (60, 60))
    weighed = [replace(c, importance=unit * (1 + c.layer)) for c in curves]
    ranks = swift_svd(weighed, 6000, alpha=1.0)
    assert ranks["q4"] > ranks["q2"] > ranks["q0"]
    plain = [replace(c, importance=1.0 + c.layer) for c in curves]
    assert ranks == swift_svd(plain, 6000, alpha=1.0)


def test_parameters_out_of_range_are_refused():
    curves = layers("q", (6, 6))
    with pytest.raises(CorankError, match="beta=1.5"):
        d_rank(curves, 90, beta=1.5)
    with pytest.raises(CorankError, match="alpha=-1"):
        swift_svd(curves, 90, alpha=-1)
    with pytest.raises(CorankError, match="delta=2"):
        swift_svd(curves, 90, delta=2)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@settings(max_examples=50, deadline=None)
@given(problem=problems(max_side=9, max_sites=8), floor=st.sampled_from([0.0, 0.5, 1.0]))
def test_extreme_parameters_stay_within_the_limit(beta, problem, floor):
    curves, limit = problem
    assert total_cost(curves, d_rank(curves, limit, beta=beta, floor=floor)) <= limit
    assert total_cost(curves, swift_svd(curves, limit, alpha=beta, delta=1 - beta, floor=floor)) <= limit


BOUNDED = st.lists(
    st.tuples(st.floats(1e-3, 1e3), st.floats(0, 100), st.floats(0, 100), st.floats(0, 1)), min_size=1, max_size=8
)


@settings(max_examples=200)
@given(parts=BOUNDED, fraction=st.floats(0, 1))
def test_divide_is_proportional_within_bounds(parts, fraction):
    weight, low, width, begin = (np.array(column) for column in zip(*parts, strict=True))
    high = low + width
    start = begin * low
    total = low.sum() + fraction * width.sum()
    x = divide(total, weight, low, high, start=start)
    scale = 1 + high.sum()
    assert x.sum() == pytest.approx(total, abs=1e-9 * scale)
    assert (x >= low).all() and (x <= high + 1e-9 * scale).all()
    # Those at no bound have the same (x - start) / weight; those at a lower one at least it, at an upper one at most.
    inside = (x > low + 1e-6 * scale) & (x < high - 1e-6 * scale)
    if inside.any():
        t = float(((x - start) / weight)[inside][0])
        np.testing.assert_allclose(x, np.clip(start + t * weight, low, high), atol=1e-6 * scale, rtol=1e-6)


@settings(max_examples=100)
@given(parts=BOUNDED, fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_divide_never_gives_less_of_more(parts, fractions):
    weight, low, width, _ = (np.array(column) for column in zip(*parts, strict=True))
    less, more = (low.sum() + f * width.sum() for f in sorted(fractions))
    assert (divide(less, weight, low, low + width) <= divide(more, weight, low, low + width) + 1e-6).all()


def test_divide_outside_of_what_is_possible():
    weight, low, high = np.array([1.0, 3.0]), np.array([2.0, 1.0]), np.array([5.0, 4.0])
    assert divide(1.0, weight, low, high).tolist() == [2, 1]
    assert divide(100.0, weight, low, high).tolist() == [5, 4]
    assert divide(6.0, weight, low, high).tolist() == [2, 4]
    assert divide(5.0, np.array([1.0, 1.0]), low, high).tolist() == [2.5, 2.5]
