"""The commands that look after a directory say what they did, and nothing that they did not."""

from __future__ import annotations

import json

import pytest
import torch

import corank
import tiny
from corank import checkpoint
from corank.cli import main


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A dense directory, `dense`, and a compressed one, `small`, in several files."""
    root = tmp_path_factory.mktemp("room")
    tiny.saved("llama-gqa", root / "dense", shard="20KB")
    corank.compress(root / "dense", "svd", keep=0.6, out=root / "small")
    return root


def weights(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_verify_says_what_it_has_checked(room, capsys):
    files = len(list((room / "small").glob("*.safetensors")))
    assert main(["verify", str(room / "small")]) == 0
    said = capsys.readouterr().out
    assert f"is what was saved: {files} weight file" in said and "SHA-256" in said and "21 factorized matrices" in said
    assert main(["verify", str(room / "small"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"model": str(room / "small"), "verified": True, "files": files, "factorized": 21}


def test_verify_claims_nothing_about_a_dense_model(room, capsys):
    assert main(["verify", str(room / "dense")]) == 0
    said = capsys.readouterr().out
    assert "dense model" in said and "no digests" in said and "what was saved" not in said
    assert main(["verify", str(room / "dense"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is False


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantize_writes_a_checkpoint_and_counts_its_bytes(scheme, room, tmp_path, capsys):
    pytest.importorskip("torchao")
    out = tmp_path / "out"
    arguments = ["quantize", str(room / "small"), "--scheme", scheme, "--group", "4", "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"as {scheme}" in said and "bits a value" in said and f"corank eval {out}" in said
    assert weights(out) < weights(room / "small")
    checkpoint.verify(out)
    ids = torch.tensor([[3, 4, 5]])
    before, after = (corank.load(place)[0](input_ids=ids).logits for place in (room / "small", out))
    assert not torch.equal(before, after) and (before - after).norm() < 0.5 * before.norm()
    assert main([*arguments[:-1], str(tmp_path / "again"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"] > found["after"] > 0
    assert (
        8 * found["after"] == pytest.approx(found["bits"] * sum(found["values"].values()))
        and scheme in found["matrices"]
    )


def test_quantize_refuses_what_has_no_factors(room, tmp_path, capsys):
    assert main(["quantize", str(room / "dense"), "--out", str(tmp_path / "out")]) == 2
    assert "no factors; compress it" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_dequantize_says_how_large_it_is(room, tmp_path, capsys):
    out = tmp_path / "plain"
    assert main(["dequantize", str(room / "small"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(out), "bytes": weights(out)}


def test_a_place_that_cannot_be_written_is_one_sentence_whatever_the_command(room, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["plot", str(room / "small"), "--out", str(tmp_path / "file" / "plots")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("corank: ") and "Not a directory" in said and said.count("\n") == 1
