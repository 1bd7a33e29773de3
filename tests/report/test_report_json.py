from __future__ import annotations

import json
import math

import pytest

from corank.errors import CorankError
from corank.evaluate import Perplexity
from corank.report import Report


def test_a_report_survives_the_file(report, tmp_path):
    path = report.save(tmp_path / "deep" / "report.json")
    assert Report.load(path) == report
    assert Report.load(path.parent) == report
    assert list(json.loads(path.read_text()))[:3] == ["corank", "model", "method"]


def test_non_finite_results_are_null_with_a_note(make_report, tmp_path):
    report = make_report(evaluation={"dense": {"a/b": 3.0}, "compressed": {"a/b": math.inf}})
    path = report.save(tmp_path / "report.json")
    plain = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert plain["evaluation"]["compressed"]["a/b"] is None
    assert plain["nonfinite"] == {"/evaluation/compressed/a~1b": "inf"}
    assert Report.load(path).perplexity("a/b") == math.inf


def test_results_of_evaluate_go_in_as_they_are():
    ppl = Perplexity(math.nan, math.nan, 7, 1, 8, True, "00", 0.1, math.nan)
    report = Report(model="m", method="svd", evaluation={"dense": {"t": 2.0}, "compressed": {"t": ppl}})
    assert math.isnan(report.perplexity("t")) and report.perplexity("t", "dense") == 2.0
    again = Report.from_json(report.to_json())
    assert again.evaluation["compressed"]["t"]["tokens"] == 7
    assert math.isnan(again.evaluation["compressed"]["t"]["value"])


def test_unknown_keys_of_another_version_are_kept(report):
    document = report.to_json() | {"novelty": {"x": [1]}}
    again = Report.from_json(document)
    assert again.extra == {"novelty": {"x": [1]}}
    assert again.to_json()["novelty"] == {"x": [1]}


def test_derived_numbers():
    report = Report(
        model="m",
        method="svd",
        accounting={"sites": {"dense": 200, "compressed": 150}, "model": {"dense": 0, "compressed": 0}},
        evaluation={
            "dense": {"wiki": 10, "acc": {"metric": "acc", "value": 0.5}, "talk": {"value": 4.0}},
            "compressed": {"wiki": {"value": 15.0}, "acc": {"metric": "acc", "value": 0.4}, "code": 7.0},
        },
        stages={"a": 1.5, "b": 2},
    )
    assert report.kept() == 0.75 and math.isnan(report.kept("model")) and math.isnan(report.kept("bytes"))
    assert report.texts() == ["wiki", "talk", "code"]
    assert report.perplexity_ratio("wiki") == 1.5
    assert math.isnan(report.perplexity_ratio("talk")) and math.isnan(report.perplexity_ratio("absent"))
    assert report.perplexity("acc") is None
    assert report.seconds == 3.5


def test_roles_are_in_the_order_of_a_block(report):
    shuffled = list(reversed(report.sites)) + [dict(report.sites[0], role="expert", layer=None)]
    again = Report(model="m", method="svd", sites=shuffled)
    assert again.roles == ["q", "k", "v", "o", "gate", "up", "down", "expert"]
    assert again.layers == list(range(30))


def test_bad_reports(report, tmp_path):
    site = {key: value for key, value in report.sites[0].items() if key not in ("rank", "loss")}
    with pytest.raises(CorankError, match="q_proj' of the report lacks loss, rank"):
        Report(model="m", method="svd", sites=[site])
    with pytest.raises(CorankError, match="no 'method'"):
        Report.from_json({"model": "m"})
    with pytest.raises(CorankError, match="no file"):
        Report.load(tmp_path / "absent.json")
    with pytest.raises(CorankError, match="JSON form"):
        Report(model="m", method="svd", data={"x": object()}).to_json()


def test_a_report_is_one_line_to_look_at(report):
    said = repr(report)
    assert len(said) < 200 and "\n" not in said and report.model in said and report.method in said
    assert repr(Report("m", "svd")) == "<Report: m by svd>"
