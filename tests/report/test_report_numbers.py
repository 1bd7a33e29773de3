from __future__ import annotations

import math

import pytest

from corank.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (17.2, "17.20"),
        (0.0123456, "0.01235"),
        (1234.5, "1,234"),
        (123456.0, "123,456"),
        (1.5e9, "1.50e+09"),
        (3e-7, "3.00e-07"),
        (0, "0"),
        (-2.5, "-2.500"),
        (None, "–"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "NaN"),
    ],
)
def test_number(value, text):
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9999, "9,999"),
        (10_000, "10.00 K"),
        (134_515_008, "134.5 M"),
        (999_960, "1.000 M"),
        (7e9, "7.000 G"),
        (None, "–"),
        (math.inf, "inf"),
    ],
)
def test_count(value, text):
    assert numbers.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.000 KiB"),
        (269_030_016, "256.6 MiB"),
        (2**40 - 1, "1.000 TiB"),
    ],
)
def test_size(value, text):
    assert numbers.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 s"),
        (0.0042, "4.2 ms"),
        (9.94, "9.9 s"),
        (9.96, "0:10"),
        (61, "1:01"),
        (3599.7, "1:00:00"),
        (90061, "25:01:01"),
        (None, "–"),
        (math.nan, "NaN"),
    ],
)
def test_duration(value, text):
    assert numbers.duration(value) == text


def test_percent_and_ratio():
    assert [numbers.percent(v) for v in (0.8, 1, None, math.nan)] == ["80.0%", "100.0%", "–", "NaN"]
    shown = [numbers.ratio(v) for v in (1.5, 14.007, 144.9, 1234.5, 2.5e6, math.inf, None)]
    assert shown == ["1.50×", "14.01×", "145×", "1,234×", "2.5e+06×", "inf", "–"]


def test_finite():
    assert [numbers.finite(v) for v in (1, 0.5, math.inf, math.nan, None, True, "1")] == [True, True] + [False] * 5
