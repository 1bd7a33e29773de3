"""What people type, and how many parameters it allows."""

from __future__ import annotations

import pytest

from corank.budget import Budget
from corank.errors import CorankError


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ({"keep": 0.8}, 800),
        ({"keep": 1}, 1000),
        ({"keep": 0.29}, 290),  # 0.29 * 1000 is 290 in decimals, a little less in binary
        ({"remove": 0.2}, 800),
        ({"remove": 0.0}, 1000),
        ({"remove": 0.9}, 100),
        ({"params": 650}, 650),
        ({"bytes": 1200}, 600),
        ({"keep": 0.8, "scope": "model"}, 720),  # 0.8 * 1400 - 400
    ],
)
def test_limit(given, limit):
    assert Budget(**given).limit(1000, 400, 16) == limit


def test_scope_model_takes_off_what_is_not_compressed():
    assert Budget(params=1100, scope="model").limit(1000, 400, 16) == 700
    assert Budget(bytes=2200, scope="model").limit(1000, 400, 16) == 700
    assert Budget(remove=0.5, scope="model").limit(1000, 400, 16) == 300


@pytest.mark.parametrize(("bits", "values"), [(16, 500), (32, 250), (8, 1000), (4.5, 1777)])
def test_bytes_depend_on_the_storage_of_a_value(bits, values):
    assert Budget(bytes=1000).limit(10_000, 0, bits) == values


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"bytes": "10GiB"}, "bytes", 10 * 2**30),
        ({"bytes": "10 gb"}, "bytes", 10**10),
        ({"bytes": "1.5MiB"}, "bytes", 3 * 2**19),
        ({"bytes": "512"}, "bytes", 512),
        ({"bytes": "1_000kB"}, "bytes", 10**6),
        ({"bytes": 7}, "bytes", 7),
        ({"params": "5.4e9"}, "params", 5_400_000_000),
        ({"params": "90M"}, "params", 90_000_000),
        ({"params": "1.1B"}, "params", 1_100_000_000),
        ({"params": "700k"}, "params", 700_000),
        ({"params": "1,234"}, "params", 1234),
        ({"params": 5.4e9}, "params", 5_400_000_000),
        ({"keep": "0.8"}, "keep", 0.8),
        ({"keep": "80%"}, "keep", 0.8),
        ({"remove": " 12.5 % "}, "remove", 0.125),
    ],
)
def test_parse(given, field, value):
    others = {name: None for name in ("keep", "remove", "params", "bytes") if name != field}
    assert Budget.parse(**given, **others) == Budget(**{field: value})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "exactly one"),
        ({"keep": 0.8, "remove": 0.2}, "both keep and remove"),
        ({"params": 5, "bytes": 5}, "both params and bytes"),
        ({"keep": 0.0}, r"outside \(0, 1\]"),
        ({"keep": 1.2}, r"outside \(0, 1\]"),
        ({"keep": 80}, "keep=0.8"),
        ({"keep": float("nan")}, "outside"),
        ({"keep": "-0.5"}, "Cannot read"),
        ({"keep": "half"}, "Cannot read"),
        ({"remove": 1.0}, r"outside \[0, 1\)"),
        ({"remove": -0.1}, "outside"),
        ({"params": 0}, "positive"),
        ({"params": "7X"}, "Cannot read"),
        ({"params": float("inf")}, "positive"),
        ({"bytes": "10 G"}, "10GiB"),  # GB or GiB? ask
        ({"bytes": "GiB"}, "Cannot read"),
        ({"bytes": -3}, "positive"),
        ({"keep": 0.5, "scope": "sitez"}, "nearest: sites"),
        ({"keeep": 0.5}, "nearest: keep"),
    ],
)
def test_mistakes_are_one_clear_sentence(given, sentence):
    with pytest.raises(CorankError, match=sentence) as caught:
        Budget.parse(**given)
    assert "\n" not in str(caught.value)


def test_a_bare_ratio_is_impossible():
    with pytest.raises(TypeError):
        Budget(0.8)


def test_a_budget_below_what_is_not_compressed_says_so():
    with pytest.raises(CorankError, match=r"params=300 of the model.*400 already"):
        Budget(params=300, scope="model").limit(1000, 400, 16)


@pytest.mark.parametrize("given", [{"keep": 0.8}, {"remove": 0.25, "scope": "model"}, {"bytes": 2**33}])
def test_dict_round_trip(given):
    budget = Budget(**given)
    assert Budget(**budget.to_dict()) == budget
    assert all(value is not None for value in budget.to_dict().values())
