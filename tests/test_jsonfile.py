from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corank import jsonfile
from corank.errors import CorankError

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text('añ∞\n"\\', max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/~ 0", max_size=3), inner, max_size=3),
    max_leaves=12,
)


def same(a, b) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text("ab/~ 0", max_size=3), values, max_size=4))
def test_nothing_is_lost_and_the_text_is_strict_json(document):
    text = jsonfile.dumps(document)
    assert same(jsonfile.decode(json.loads(text, parse_constant=pytest.fail)), document)


def test_an_encoded_part_can_be_put_into_a_whole():
    part = jsonfile.encode({"value": math.inf})
    whole = jsonfile.encode({"dense": {"wiki": part}})
    assert whole == {"dense": {"wiki": {"value": None}}, "nonfinite": {"/dense/wiki/value": "inf"}}
    assert jsonfile.decode(whole) == {"dense": {"wiki": {"value": math.inf}}}


def test_other_types_become_plain_ones():
    document = {
        "numpy": np.float32(0.5),
        "array": np.array([[1, 2]]),
        "torch": torch.tensor(3),
        "path": Path("a/b"),
        "tuple": (1, 2),
        "set": {"b", "a"},
        7: np.int64(1),
    }
    expected = {
        "numpy": 0.5,
        "array": [[1, 2]],
        "torch": 3,
        "path": "a/b",
        "tuple": [1, 2],
        "set": ["a", "b"],
    }
    assert jsonfile.encode(document) == expected | {"7": 1}
    with pytest.raises(CorankError, match="/a/1 is a object"):
        jsonfile.encode({"a": [1, object()]})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = jsonfile.write_json(tmp_path / "deep" / "x.json", {"a": 1})
    monkeypatch.setattr(jsonfile.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        jsonfile.write_json(path, {"a": 2})
    assert jsonfile.read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_note_about_a_place_that_is_gone_is_void():
    assert jsonfile.decode({"a": 1, "nonfinite": {"/b/c": "inf", "/a/0": "nan"}}) == {"a": 1}


@pytest.mark.parametrize(("text", "message"), [("[1]", "list, not an object"), ("{", "not JSON"), (None, "no file")])
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CorankError, match=message):
        jsonfile.read_json(path)
    with pytest.raises(CorankError, match="directory"):
        jsonfile.read_json(tmp_path)
