"""A chain: a narrowed model, ordinary or with widths of its own, is a dense model to methods that factorize."""

from __future__ import annotations

import pytest
import torch
from depth_cases import DATA, logits, some_ids

import corank
from corank.cli import main
from corank.errors import CorankError
from corank.inspection import describe
from corank.jsonfile import read_json
from corank.model import ResidentModel, StreamedModel
from tiny import saved, text, tokenizer

NARROW = {
    "ordinary": dict(method="modegpt", uniform=True, keep=0.8),
    "own widths": dict(method="modegpt", keep=0.8),
    "heads too": dict(method="flap", keep=0.7),
}


def widths_in(folder):
    section = read_json(folder / "config.json").get("quantization_config") or {}
    return (section.get("shape") or {}).get("blocks")


@pytest.fixture(scope="module")
def narrowed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrowed")
    saved("llama-gqa", folder / "dense")
    for name, settings in NARROW.items():
        corank.compress(folder / "dense", out=folder / name, **settings, **DATA)
    return folder


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("families", ["factorize", "both"])
def test_best_goes_on_from_what_a_structured_method_wrote(narrowed, name, families, tmp_path):
    source, out = narrowed / name, tmp_path / "out"
    given = widths_in(source)
    assert (given is None) == (name == "ordinary")
    report = corank.compress(source, "best", keep=0.8, families=families, out=out, **DATA)
    small, _ = corank.load(source)
    loaded, _ = corank.load(out)
    inside = sum(m.weight.numel() for m in small.model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert report.accounting["sites"]["dense"] == inside and report.kept() <= 0.8
    assert report.accounting["model"]["dense"] == sum(p.numel() for p in small.parameters())
    blocks = widths_in(out)
    if families == "factorize":
        assert blocks == given
    else:
        before = given or [dict(channels=small.config.intermediate_size, kv_heads=2)] * 3
        assert all(a["channels"] <= b["channels"] for a, b in zip(blocks, before, strict=True))
        assert blocks != given
    # all that it was to lose is what it has lost, and no more than a model in memory loses
    assert torch.isfinite(logits(loaded, some_ids())).all()
    memory = corank.compress(small, "best", keep=0.8, families=families, tokenizer=tokenizer(), **DATA)
    assert memory.structure == report.structure
    torch.testing.assert_close(logits(loaded, some_ids()), logits(small, some_ids()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NARROW)
def test_it_is_opened_with_the_widths_it_has(narrowed, name):
    loaded, _ = corank.load(narrowed / name)
    shapes = {n: tuple(m.weight.shape) for n, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)}
    for source in (StreamedModel(narrowed / name), ResidentModel(loaded)):
        assert all(s.shape == shapes[s.name] for s in source.outline.sites)
        assert source.outline.parameters == sum(p.numel() for p in loaded.parameters())
    assert describe(narrowed / name)["parameters"] == sum(p.numel() for p in loaded.parameters())


def test_nothing_is_lost_where_the_budget_asks_for_nothing(narrowed, tmp_path):
    corank.compress(narrowed / "own widths", "best", keep=1.0, out=tmp_path / "same", **DATA)
    before, after = (corank.load(f)[0] for f in (narrowed / "own widths", tmp_path / "same"))
    assert torch.equal(logits(before, some_ids()), logits(after, some_ids()))


def test_what_cannot_go_on_says_so(narrowed, tmp_path):
    with pytest.raises(CorankError, match="narrowed already"):
        corank.compress(narrowed / "own widths", "flap", keep=0.8, out=tmp_path / "x", **DATA)
    corank.compress(narrowed / "own widths", "svd-llm", keep=0.8, out=tmp_path / "once", **DATA)
    with pytest.raises(CorankError, match="compressed or quantized already"):
        corank.compress(tmp_path / "once", "svd-llm", keep=0.8, out=tmp_path / "twice", **DATA)
    again = corank.compress(narrowed / "ordinary", "flap", keep=0.8, out=tmp_path / "y", **DATA)
    assert again.kept() <= 0.8


def test_the_command_line_goes_on_and_compares_with_the_narrowed_model(narrowed, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text(text(9000))
    given = [
        "--keep",
        "0.8",
        "--data",
        str(words),
        "--samples",
        "6",
        "--length",
        "16",
        "--windows",
        "2",
        "--window",
        "32",
    ]
    assert main(["compress", str(narrowed / "own widths"), *given, "--out", str(tmp_path / "out")]) == 0
    assert "import corank, then" in capsys.readouterr().out
    evaluation = read_json(tmp_path / "out" / "report.json")["evaluation"]
    assert set(evaluation) >= {"dense", "compressed"}
