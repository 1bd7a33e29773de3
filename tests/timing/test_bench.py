"""`corank bench --predict`: predicted beside measured, or on its own from config.json."""

from __future__ import annotations

import json
import sys

import pytest

import corank
from corank.cli import main
from corank.evaluate import Bound, speed
from corank.timing import RUNTIMES, Device, find_device, predict
from tiny import saved, text

BOUND = Bound(flops_per_s=1e12, bytes_per_s=1e11, device="cpu", dtype="float32", threads=1)
ROUND = Device("round numbers", "float32", bytes_per_s=1e9, flops_per_s=1e10, kernel_s=1e-6)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    saved("llama-gqa", folder / "dense")
    (folder / "text.txt").write_text(text())
    words = {"data": folder / "text.txt", "samples": 8, "length": 32}
    corank.compress(folder / "dense", "svd-llm", keep=0.5, out=folder / "small", **words)
    (folder / "round.json").write_text(json.dumps(ROUND.to_json()))
    return folder


def test_rows_hold_the_prediction_of_the_same_steps(place):
    model, _ = corank.load(place / "small")
    (row,) = speed({"small": model}, 16, 4, (2,), 1, bound=BOUND, predict=ROUND)
    prefill, decode = predict(model, ROUND, 2, 16, "prefill"), predict(model, ROUND, 2, 18, "decode")
    assert row.prefill_predicted == prefill.tokens_per_s == pytest.approx(32 / prefill.seconds)
    assert row.decode_predicted == decode.tokens_per_s == pytest.approx(2 / decode.seconds)
    assert row.prefill_floor == pytest.approx(prefill.floor / (32 / row.prefill_tokens_per_s))
    assert row.decode_floor == pytest.approx(decode.floor / (2 / row.decode_tokens_per_s))
    (plain,) = speed({"small": model}, 4, 1, (1,), 1, bound=BOUND)
    assert plain.decode_predicted is None and plain.decode_floor is None


def test_a_directory_is_predicted_without_a_baseline(place, capsys):
    command = ["bench", str(place / "small"), "--predict", "--batch", "1,4", "--prompt-tokens", "16", "--json"]
    assert main([*command, "--device-model", str(place / "round.json")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["measured"] == [] and len(said["predicted"]) == 2 * 2 * len(RUNTIMES)
    for row in said["predicted"]:
        step = predict(place / "small", ROUND, row["batch"], 16, row["mode"], row["runtime"])
        dense = predict(place / "dense", ROUND, row["batch"], 16, row["mode"], row["runtime"])
        assert row["seconds"] == step.seconds and row["launches"] == step.launches and row["bytes"] == step.nbytes
        assert row["speedup"] == pytest.approx(dense.seconds / step.seconds)


def test_the_verdict(place, capsys):
    command = ["bench", str(place / "small"), "--predict", "--prompt-tokens", "16"]
    assert main([*command, "--device-model", "h200"]) == 0  # to such a device a tiny model is nothing but launches
    said = " ".join(capsys.readouterr().out.split())
    assert "assumed figures" in said and "small: memory only; at best" in said
    few = {**ROUND.to_json(), "kernel_s": 0.0}
    (place / "no-launches.json").write_text(json.dumps(few))
    assert main([*command, "--device-model", str(place / "no-launches.json")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "memory only" not in said and "small: at best" in said
    assert main(["bench", str(place / "dense"), "--predict", "--device-model", "h200"]) == 0
    assert "at best" not in capsys.readouterr().out  # a dense model is no faster than itself


def test_predicted_beside_measured(place, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["corank.evaluate.speed"], "this_device", lambda device, dtype: ROUND)
    command = ["bench", str(place / "small"), "--baseline", str(place / "dense"), "--predict"]
    sizes = ["--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1"]
    assert main([*command, *sizes, "--device-model", "h200", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in said["measured"]] == ["dense", "small"]
    assert all(row["decode_predicted"] > 0 for row in said["measured"])
    assert {row["device"]["name"] for row in said["predicted"]} == {find_device("h200").name}
    assert main([*command, *sizes]) == 0
    assert "predicted" in capsys.readouterr().out


def test_bad_input_says_what_to_do(place, capsys):
    assert main(["bench", str(place / "small")]) == 2
    assert "Give --baseline" in capsys.readouterr().err
    assert main(["bench", str(place / "small"), "--baseline", "x", "--device-model", "h200"]) == 2
    assert "--predict" in capsys.readouterr().err
    assert main(["bench", str(place / "small"), "--predict", "--device-model", "h20"]) == 2
    assert "nearest: h200" in capsys.readouterr().err
