"""Targets and refits that need two streams, on experts, on a model that runs as a whole, and on convolutions."""

from __future__ import annotations

import pytest
import torch
from families import inputs, logits, make

import corank
from corank import checkpoint
from corank.model import Text
from tiny import text, tokenizer

DATA = dict(data=Text(text(), "words"), samples=4, length=12, batch=2)

RUNS = {
    "mpifa": dict(method="mpifa", multiple=1),
    "saes-svd": dict(method="saes-svd"),
    "adasvd": dict(method="adasvd"),
    "affine": dict(method="lord", target="mixed", start="dense", alternations=1),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["qwen2-moe", "t5"])
def test_a_compressed_model_is_what_was_saved_and_its_losses_are_those_predicted(name, run, tmp_path):
    model = make(name)
    report = corank.compress(model, keep=0.7, tokenizer=tokenizer(), out=tmp_path / "out", **RUNS[run], **DATA)
    made = [row for row in report.sites if row["kind"] != "dense"]
    assert len(made) > 8
    for row in made:
        assert 0 <= row["loss"] < 1 and row["loss"] == pytest.approx(row["predicted_loss"], rel=1e-3, abs=1e-4)
    sites = report.accounting["sites"]
    assert 0.6 * sites["dense"] < sites["compressed"] <= 0.7 * sites["dense"]
    loaded, _ = checkpoint.load(tmp_path / "out")
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    torch.testing.assert_close(logits(loaded, inputs(name)), logits(model, inputs(name)))
