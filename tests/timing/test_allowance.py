"""Benchmarks end in the time that they are allowed, whatever the machine; what is left out is said."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import compress_speed, speed  # noqa: E402
from benchmarks.allowance import Allowance, OutOfTime, within  # noqa: E402
from benchmarks.chunked import chunked  # noqa: E402
from benchmarks.rounds import rounds  # noqa: E402


class Hands:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def take(self, seconds):
        def work():
            self.now += seconds

        return work


def test_shares_of_what_is_left():
    clock = Hands()
    whole = Allowance(100.0, clock)
    half = whole.part(0.5)
    assert half.left == 50.0 and whole.describe() == "at most 100 s"
    clock.now = 30.0
    assert (whole.left, half.left, whole.part(0.5).left) == (70.0, 20.0, 35.0)
    clock.now = 200.0
    assert whole.left == half.left == whole.part(1.0).left == 0.0
    endless = Allowance(None, clock)
    assert math.isinf(endless.left) and math.isinf(endless.part(0.1).left) and "as long" in endless.describe()


@pytest.mark.parametrize("seconds,counted", [(None, 9), (1000.0, 9), (66.0, 5), (33.0, 2), (12.0, 1), (0.0, 1)])
def test_no_round_begins_that_would_not_end_in_time(seconds, counted):
    """A round takes 10 + 1 seconds, the first one is not counted."""
    clock = Hands()
    found = rounds({"a": clock.take(10.0), "b": clock.take(1.0)}, 9, 1, clock, Allowance(seconds, clock))
    assert found == {"a": [10.0] * counted, "b": [1.0] * counted}
    assert clock.now == 11.0 * (counted + 1) and (seconds is None or clock.now <= max(seconds, 22.0))


def test_what_runs_too_long_is_interrupted_and_what_is_around_goes_on():
    with within(Allowance(3000.0)):
        with pytest.raises(OutOfTime), within(Allowance(0.01)):
            while True:
                pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 100  # the outer one runs again
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(OutOfTime), within(Allowance(0.01)), within(Allowance(3000.0)):
        while True:  # the one that ends first counts
            pass
    with within(Allowance(None)):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert not issubclass(OutOfTime, Exception)  # a compiler that catches every failure lets it through


def test_rows_of_the_chunked_mlp():
    rows = {row["variant"]: row for row in chunked(2, Allowance(), toy=True)}
    assert list(rows) == ["dense", "factorized", "chunks of 8", "chunks of 2"]
    peaks = [rows[name]["peak_bytes"] for name in list(rows)[1:]]
    assert peaks == sorted(peaks, reverse=True) and rows["chunks of 2"]["peak_saved"] == 1 - peaks[2] / peaks[0]
    assert rows["factorized"]["speedup_over_unfused"]["median"] == 1.0 == rows["dense"]["speedup"]["median"]
    assert rows["factorized"]["same_bits"] is True and rows["dense"]["same_bits"] is None


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_trial_of_the_speed_table(here, capsys):
    sizes = ["--toy", "--no-compile", "--shapes", "smollm2-135m", "--repeats", "2"]
    speed.main([*sizes, "--out", str(here / "speed.json")])
    found = json.loads((here / "speed.json").read_text())
    assert found["left_out"] == [] and found["toy"] and len(found["device"]) in (1, 2)
    assert {row["variant"] for row in found["models"]} >= {"dense", "factorized", "factorized packed"}
    for row in found["models"]:
        share = row["kept"]
        assert (share == 1.0) == (row["variant"] == "dense") and 0 < share <= 1
        for mode in ("prefill", "decode"):
            if "of_ceiling" in row[mode]:
                assert row["variant"] != "dense"
                assert row[mode]["of_ceiling"] == pytest.approx(row[mode]["blocks_speedup"]["median"] * share)
    assert (
        all(row["rounds"] >= 1 for row in found["linears"]) and [r["variant"] for r in found["chunked"]][0] == "dense"
    )
    said = capsys.readouterr().out
    assert "3 tables, at most 5" in said and "smollm2-135m: about" in said and "of 1 / keep" in said
    speed.main([*sizes, "--minutes", "0.00001", "--out", str(here / "none.json")])
    none = json.loads((here / "none.json").read_text())
    assert none["left_out"] == ["linears", "chunked", "smollm2-135m"] and not {"linears", "models"} & set(none)
    assert capsys.readouterr().out.count("left out: it takes longer") == 3
    assert sorted(p.name for p in here.iterdir()) == ["none.json", "speed.json", "speed.png"]


def test_a_trial_of_the_compression_table(here, capsys):
    compress_speed.main(["--toy", "--jobs", "curing,svd-llm", "--out", str(here / "found.json")])
    found = json.loads((here / "found.json").read_text())
    curing, svd = found["rows"]
    assert curing["paper"]["seconds"] == 129.0 and curing["paper"]["ours"] is False and svd["matrices"] > 0
    for row in found["rows"]:
        assert row["calibration_seconds"] + row["factorization_seconds"] <= row["seconds"] and row["layers"] <= 3
    assert "2 jobs, at most 5" in capsys.readouterr().out
    compress_speed.main(["--toy", "--jobs", "best", "--minutes", "0.00001", "--out", str(here / "none.json")])
    assert json.loads((here / "none.json").read_text())["left_out"] == ["best"]
    with pytest.raises(SystemExit):
        compress_speed.main(["--toy", "--jobs", "nothing"])
