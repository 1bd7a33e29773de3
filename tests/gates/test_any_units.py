"""One score map of channels and heads: any size in the native format."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import corank
from corank.errors import CorankError
from corank.gates import Gates, StraightThrough
from corank.gates.any_size import UnitMap, load_map
from corank.model import ResidentModel, Text
from corank.structured.gated import unit_place
from corank.structured.units import find_units
from tiny import saved, text, tiny, tokenizer, windows

DATA = dict(data=Text(text(), "words"), samples=6, length=16, batch=4, steps=10)
IDS = windows().ids


def logits(model):
    if not hasattr(model, "forward"):
        model = corank.load(model)[0]
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A float64 model, dense, and with a map for all sizes; at two of them, of the same widths in all blocks."""
    folder = tmp_path_factory.mktemp("units")
    saved("llama-gqa", folder / "dense", dtype=torch.float64)
    for keep, uniform in ((1.0, False), (0.6, False), (0.6, True)):
        corank.compress(
            folder / "dense",
            "acip-units",
            keep=keep,
            uniform=uniform,
            dtype="float64",
            out=folder / f"{keep}{uniform}",
            **DATA,
        )
    return folder


@pytest.mark.parametrize("uniform", [False, True])
def test_pruning_is_compressing_from_the_same_map(made, tmp_path, uniform):
    report = corank.prune(made / "1.0False", keep=0.6, uniform=uniform, out=tmp_path / "a")
    expected = corank.Report.load(made / f"0.6{uniform}" / "report.json")
    torch.testing.assert_close(logits(tmp_path / "a"), logits(made / f"0.6{uniform}"), rtol=1e-10, atol=1e-10)
    assert report.accounting["sites"] == expected.accounting["sites"]
    assert report.accounting["model"] == expected.accounting["model"]
    assert report.accounting["flops_per_token"] == expected.accounting["flops_per_token"]
    assert report.structure["class"] == expected.structure["class"] == ("N0" if uniform else "N2")
    if uniform:  # in two steps, and without any door
        corank.prune(made / "1.0False", keep=0.8, uniform=True, out=tmp_path / "b")
        again = corank.prune(tmp_path / "b", remove=0.4, out=tmp_path / "c")
        torch.testing.assert_close(logits(tmp_path / "c"), logits(tmp_path / "a"), rtol=1e-10, atol=1e-10)
        assert again.accounting["sites"] == report.accounting["sites"]
        assert "quantization_config" not in json.loads((tmp_path / "c" / "config.json").read_text())
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float64)
        torch.testing.assert_close(logits(plain), logits(tmp_path / "a"), rtol=1e-10, atol=1e-10)


def test_keeping_everything_is_the_identity(made, tmp_path):
    assert torch.equal(logits(made / "1.0False"), logits(made / "dense"))
    corank.prune(made / "1.0False", keep=1, out=tmp_path / "same")
    assert torch.equal(logits(tmp_path / "same"), logits(made / "dense"))


def test_a_narrowed_model_is_the_masked_forward(made, tmp_path):
    stored = load_map(made / "1.0False")
    assert isinstance(stored, UnitMap)
    small = corank.prune(made / "1.0False", keep=0.5, out=tmp_path / "small")
    source = ResidentModel(corank.load(made / "dense")[0])
    units = {}
    for layer in range(3):
        path = source.outline.path(layer)
        found, _ = find_units(
            source.model.get_submodule(path), source.outline.in_layer(layer), f"{path}.", source.config
        )
        units |= {u.name: u for u in found if u.kind in ("channels", "heads")}
    assert units.keys() == stored.scores.scores.keys()
    gates = Gates([unit_place(u) for u in units.values()], StraightThrough(), dtype=torch.float64)
    sizes = {}
    for layer, width in enumerate(small.structure["blocks"]):
        sizes |= {f"model.layers.{layer}.mlp.down_proj": width["channels"]}
        sizes |= {f"model.layers.{layer}.self_attn.o_proj": width["kv_heads"]}
    assert len(set(sizes.values())) > 2  # not the same everywhere
    ranked = stored.scores.ranked()
    with torch.no_grad():
        for name, theta in gates.theta.items():
            theta.fill_(-1.0)
            theta[ranked[name][: sizes[name]]] = 1.0
    with gates.attached(source.model):
        torch.testing.assert_close(logits(tmp_path / "small"), logits(source.model), rtol=1e-9, atol=1e-9)


def test_sizes_are_met_and_nested(made, tmp_path):
    before = None
    for keep in (0.4, 0.55, 0.7, 0.9):
        report = corank.prune(made / "1.0False", keep=keep, out=tmp_path / f"{keep}")
        sites = report.accounting["sites"]
        assert (keep - 0.12) * sites["dense"] < sites["compressed"] <= keep * sites["dense"]
        widths = [(b["channels"], b["kv_heads"]) for b in report.structure["blocks"]]
        if before is not None:
            assert all(c <= d and h <= k for (c, h), (d, k) in zip(before, widths, strict=True))
        before = widths


def test_units_that_nothing_reads_go_first():
    model = tiny("llama-gqa")
    dead = torch.arange(0, 37, 3)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, dead] = 0.0
    before = logits(model)
    report = corank.compress(
        model, "acip-units", keep=0.85, attention=False, tokenizer=tokenizer(), **{**DATA, "steps": 20}
    )
    assert report.accounting["sites"]["compressed"] < report.accounting["sites"]["dense"]
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_what_units_refuse(made, tmp_path):
    def refused(match, source="1.0False", **given):
        with pytest.raises(CorankError, match=match):
            corank.prune(made / source, out=tmp_path / "x", **given)
        assert not (tmp_path / "x").exists()

    refused("different widths already", "0.6False", keep=0.5)
    refused(r"holds 0\.\d+ of the parameters .* asks for more", "0.6True", keep=0.9)
    refused("have to stay|a unit in every part", keep=0.001)
    with pytest.raises(CorankError, match="to between"):
        corank.compress(tiny("llama-gqa"), "acip-units", keep=0.6, to=2.0, tokenizer=tokenizer(), **DATA)
