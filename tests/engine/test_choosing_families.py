"""Factors and narrower vectors by one curve: what is chosen, what it loses, and what is written."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from narrow_together import compress_both
from safetensors import safe_open

import corank
from corank import recipe
from corank.cli import main
from corank.engine import narrowing
from corank.engine.gradients import next_token_loss
from corank.errors import CorankError
from corank.factors import weight_of
from corank.inspection import plan_for
from corank.jsonfile import read_json
from corank.model import Text, calibration
from corank.serve.vllm.specs import read_specs
from processes import join, start_group
from tiny import saved, text, tiny, tokenizer

TEXT = Text(text(), "words")
DATA = dict(data=TEXT, samples=8, length=32, batch=4)
EXACT = dict(shrink_inputs=0.0, shrink_outputs=0.0)


def run(model, families="both", keep=0.7, **settings):
    return corank.compress(
        model, "best", keep=keep, families=families, **{"tokenizer": tokenizer(), **DATA, **settings}
    )


@torch.no_grad()
def logits(model, ids=None):
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(5)) if ids is None else ids
    return model(input_ids=ids).logits


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            found |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return found


def planted(seed=0):
    """In block 0 fifteen channels are made by others' rows; in block 1 the feed-forward matrices have rank 4."""
    model = tiny("llama-gqa", seed, torch.float64)
    with torch.no_grad():
        first, second = (model.model.layers[i].mlp for i in (0, 1))
        for proj in (first.gate_proj, first.up_proj):
            proj.weight[22:] = proj.weight[:15]
        g = torch.Generator().manual_seed(seed)
        for proj in (second.gate_proj, second.up_proj, second.down_proj):
            m, n = proj.weight.shape
            A, B = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((m, 4), (4, n)))
            proj.weight.copy_(A @ B * 0.4)
    return model


def row_of(report, name):
    return next(r for r in report.sites if r["name"].endswith(name))


def test_each_block_is_stored_in_the_family_that_fits_it_and_nothing_is_lost():
    """37 -> 22 channels saves 15 * 72 parameters, three pivoted pairs of rank 4 save 3 * (888 - 232): keep 0.7687 for free."""
    dense = planted()
    before, lost = logits(dense), {}
    for families in ("both", "factorize", "narrow"):
        model = copy.deepcopy(dense)
        report = run(model, families, 0.77, **EXACT)
        assert report.kept() <= 0.77
        lost[families] = report.predicted_increase
        changed = float((logits(model) - before).abs().max())
        if families != "both":
            assert changed > 1e-3
            continue
        assert changed < 1e-7
        assert report.structure["narrowed"] == {"model.layers.0.mlp.down_proj": 22}
        kinds = [row_of(report, f"layers.1.mlp.{n}_proj")["kind"] for n in ("gate", "up", "down")]
        assert kinds == ["row_pivoted"] * 3
        assert [row_of(report, f"layers.0.mlp.{n}_proj")["kind"] for n in ("gate", "up", "down")] == ["narrow"] * 3
        assert model.model.layers[0].mlp.gate_proj.weight.shape == (22, 24)
        assert model.model.layers[1].mlp.gate_proj.rank == 4
    assert lost["both"] < 1e-12 < min(lost["factorize"], lost["narrow"])


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
def test_both_loses_no_more_than_either_and_no_budget_is_exceeded(keep):
    lost = {}
    for families in ("factorize", "narrow", "both"):
        model = tiny("llama-gqa", 1, torch.float64)
        report = run(model, families, keep)
        lost[families] = report.predicted_increase
        assert keep - 0.02 < report.kept() <= keep
        assert report.accounting["sites"]["compressed"] == sum(r["params"] for r in report.sites)
        for r in report.sites:
            assert r["loss"] == pytest.approx(r["predicted_loss"], rel=1e-6, abs=1e-7)
            if "becomes" in r and r["kind"] == "narrow":
                layer = model.get_submodule(r["name"])
                assert list(layer.weight.shape) == r["becomes"]["shape"] and layer.weight.numel() == r["params"]
    assert lost["both"] <= min(lost.values()) * (1 + 1e-9)


def metrics(model, name):
    """C and R of one matrix on the calibration windows, by autograd on the whole model."""
    ids = calibration(tokenizer(), TEXT, DATA["samples"], DATA["length"], 0).ids
    seen = {}
    layer = model.get_submodule(name)

    def forward(_m, args, out):
        seen["x"], seen["y"] = args[0].detach(), out
        out.retain_grad()

    handle = layer.register_forward_hook(forward)
    for p in model.parameters():
        p.requires_grad_(True)
    next_token_loss(model(input_ids=ids).logits.double(), ids, None, True).backward()
    handle.remove()
    X, g = seen["x"].flatten(0, 1), seen["y"].grad.flatten(0, 1)
    return X.T @ X / len(X), g.T @ g / len(g)


def test_predicted_nats_of_a_narrowed_and_factorized_matrix_are_those_of_the_stored_one(monkeypatch):
    """Against metrics that the test measures itself: tr(R E C E^T) / 2, E what is missing in the whole matrix."""
    monkeypatch.setattr(narrowing, "SHARES", (27 / 37,))
    dense = planted()
    with torch.no_grad():  # channels to spare, and few directions in what reads them
        down = dense.model.layers[0].mlp.down_proj.weight
        U, S, Vh = torch.linalg.svd(down)
        down.copy_(U[:, :24] * (S * 0.3 ** torch.arange(24)) @ Vh[:24])
    model, selected, made = copy.deepcopy(dense), {}, narrowing.parts_of

    def parts_of(vector, kept, given, *known):
        selected[vector.name] = kept
        return made(vector, kept, given, *known)

    monkeypatch.setattr(narrowing, "parts_of", parts_of)
    report = run(model, "both", 0.5, **EXACT)
    name = "model.layers.0.mlp.down_proj"
    assert row_of(report, name)["kind"] == "row_pivoted" and report.structure["narrowed"][name] == 27
    C, R = metrics(dense, name)
    W, F = dense.get_submodule(name).weight.detach(), weight_of(model.get_submodule(name))
    kept = selected[name]
    assert F.shape == (24, 27) and len(kept) == 27
    E = W.clone()
    E[:, kept] -= F
    row = row_of(report, name)
    assert float((R @ E * (E @ C)).sum()) / 2 == pytest.approx(row["predicted_nats"], rel=1e-5)
    assert row["predicted_nats"] > 0
    # no other selection of as many channels, drawn at random, loses less before its matrices are factorized
    V = (W @ C)[:, kept] @ torch.linalg.pinv(C[kept][:, kept], rtol=1e-12, hermitian=True)
    E = W.clone()
    E[:, kept] -= V
    mine = float((R @ E * (E @ C)).sum())
    for seed in range(10):
        J = torch.randperm(37, generator=torch.Generator().manual_seed(seed))[:27]
        V = (W @ C)[:, J] @ torch.linalg.pinv(C[J][:, J], rtol=1e-12, hermitian=True)
        E = W.clone()
        E[:, J] -= V
        assert mine < float((R @ E * (E @ C)).sum())


def test_what_gradients_come_back_through_is_known_where_channels_have_taken_over_from_others(monkeypatch):
    """The metric of a narrowed gate, against the one that the narrowed model has."""
    seen, made = {}, narrowing.parts_of

    def parts_of(vector, kept, given, *known):
        parts = made(vector, kept, given, *known)
        rows, _ = vector.rows(vector.producers[0], kept)
        R = given[vector.producers[0].name][2].R
        seen[vector.name] = R[rows][:, rows], parts[vector.producers[0].name].geometry.R
        return parts

    monkeypatch.setattr(narrowing, "parts_of", parts_of)
    model = planted()
    run(model, "both", 0.77, **EXACT)
    _, R = metrics(model, "model.layers.0.mlp.gate_proj")
    before, predicted = seen["model.layers.0.mlp.down_proj"]
    assert R.shape == predicted.shape == (22, 22)

    def away(metric):
        return float((metric.diagonal() / R.diagonal()).log().abs().mean())

    assert away(predicted) < 0.5 * away(before) and away(predicted) < 0.2 < away(before)


def test_auto_is_both_where_the_other_settings_allow_it(tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    for name, settings, families in (
        ("default", {}, "both"),
        ("uniform", {"allocate": "uniform"}, "factorize"),
        ("anchored", {"target": "anchored"}, "factorize"),
    ):
        auto, named = tmp_path / name, tmp_path / f"{name}-named"
        corank.compress(folder, "best", keep=0.7, out=auto, **settings, **DATA)
        corank.compress(folder, "best", keep=0.7, families=families, out=named, **settings, **DATA)
        found, expected = tensors(auto), tensors(named)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
    section = read_json(tmp_path / "uniform" / "config.json")["quantization_config"]
    assert section["shape"] is None and "widths" not in section["plan"]
    assert "structure" not in read_json(tmp_path / "uniform" / "report.json")
    assert read_json(tmp_path / "default" / "report.json")["structure"]["narrowed"]


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-bias", "gpt2-conv1d", "phi3-fused", "opt"])
@pytest.mark.parametrize("families", ["both", "narrow"])
def test_from_disk_to_disk_gives_what_in_memory_gives_and_it_loads(name, families, tmp_path):
    folder = saved(name, tmp_path / "dense", dtype=torch.float64, shard="20KB")
    keep = 0.75
    model, words = tiny(name, dtype=torch.float64), tf.AutoTokenizer.from_pretrained(folder)
    inside = run(model, families, keep, tokenizer=words, out=tmp_path / "memory")
    streamed = corank.compress(
        folder, "best", keep=keep, families=families, out=tmp_path / "disk", dtype="float64", **DATA
    )
    assert inside.structure == streamed.structure and streamed.structure["narrowed"]
    assert inside.accounting["model"] == streamed.accounting["model"]
    first, second = tensors(tmp_path / "memory"), tensors(tmp_path / "disk")
    assert {k: v.shape for k, v in first.items()}.items() <= {k: v.shape for k, v in second.items()}.items() or (
        set(first) ^ set(second)
    ) <= {"lm_head.weight"}
    whole = logits(model)
    for where in ("memory", "disk"):
        loaded, _ = corank.load(tmp_path / where)
        torch.testing.assert_close(logits(loaded), whole, rtol=1e-8, atol=1e-8)
        if families == "narrow":
            count = sum(p.numel() for p in loaded.parameters())
            assert count == inside.accounting["model"]["compressed"]
    ids = torch.tensor([[5, 9, 20, 11]])
    given = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(loaded.generate(ids, use_cache=True, **given), loaded.generate(ids, use_cache=False, **given))
    kinds = {r["kind"] for r in streamed.sites}
    assert ("narrow" in kinds) and (families == "both" or kinds <= {"narrow", "dense"})
    assert streamed.structure["class"] == ("N2" if families == "narrow" else "N4")


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    settings = dict(keep=0.6, families="both", **DATA)
    corank.compress(folder, "best", out=tmp_path / "whole", **settings)

    def kill(layer, stage, error):
        if (layer, stage) == (1, "factorize"):
            raise Killed

    with pytest.raises(Killed):
        corank.compress(folder, "best", out=tmp_path / "again", progress=kill, **settings)
    blocks = tmp_path / "again.partial" / "blocks"
    stamp = (blocks / "00000.safetensors").stat().st_mtime_ns
    assert not (blocks / "00002.json").exists()
    seen = []

    def watch(layer, stage, error):
        seen.append((layer, stage))
        if blocks.exists():
            assert (blocks / "00000.safetensors").stat().st_mtime_ns == stamp

    corank.compress(folder, "best", out=tmp_path / "again", progress=watch, **settings)
    assert (2, "factorize") in seen and (0, "factorize") not in seen
    whole, again = (sorted((tmp_path / n).glob("*.safetensors")) for n in ("whole", "again"))
    assert [f.read_bytes() for f in whole] == [f.read_bytes() for f in again]
    sections = [
        json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("whole", "again")
    ]
    assert sections[0]["shape"] == sections[1]["shape"] and sections[0]["modules"] == sections[1]["modules"]


def test_a_second_ratio_from_the_cache_finds_the_orders_that_are_known(tmp_path, monkeypatch):
    folder = saved("llama-gqa", tmp_path / "dense")
    calls = []
    found = narrowing.nested_units
    monkeypatch.setattr(narrowing, "nested_units", lambda *a, **k: calls.append(1) or found(*a, **k))
    for keep, count in ((0.8, 6), (0.6, 6)):
        corank.compress(
            folder, "best", keep=keep, families="both", out=tmp_path / f"{keep}", cache=tmp_path / "cache", **DATA
        )
        assert len(calls) == count  # channels and heads of three blocks, once


def test_a_plan_says_the_widths_beforehand(tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    given = dict(data="builtin-test", samples=8, length=32, seed=0, batch=4, device="cpu", dtype=None)
    given["watch"] = lambda *a: None
    plan = plan_for(folder, "best", {"keep": 0.6}, None, {"families": "both"}, **given)
    assert plan["widths"] and plan["cost"] <= plan["limit"]
    assert sum(r["kept"] * r["sites"] for r in plan["roles"]) > 0 and all(r["kept"] <= 1 for r in plan["roles"])


def test_a_narrowed_model_is_healed_like_any_other(tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    words = Text(text(9000, 3), "others")
    report = corank.compress(
        folder,
        "best",
        keep=0.6,
        families="both",
        effort="balanced",
        out=tmp_path / "healed",
        epochs=1,
        **{**DATA, "data": words},
    )
    loaded, _ = corank.load(tmp_path / "healed")
    blocks = read_json(tmp_path / "healed" / "config.json")["quantization_config"]["shape"]["blocks"]
    assert [b["channels"] for b in blocks] == [layer.mlp.gate_proj.out_features for layer in loaded.model.layers]
    assert report.extra["healing"] and torch.isfinite(logits(loaded)).all()


def test_heads_go_with_their_queries_and_the_rest_of_their_matrices(tmp_path):
    """One key-value head is read by nobody: its group goes for free, with q, k, v and o, whatever they are like."""
    model = tiny("llama-gqa", 3, torch.float64)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, :12] = 0
    before = logits(model)
    report = run(model, "narrow", 0.9, **EXACT)
    assert report.structure["narrowed"]["model.layers.1.self_attn.o_proj"] == 1
    assert {n: row_of(report, f"layers.1.self_attn.{n}_proj")["becomes"]["shape"] for n in "qkvo"} == {
        "q": [12, 24],
        "k": [6, 24],
        "v": [6, 24],
        "o": [24, 12],
    }
    # 3 * 1728 parameters of attention in 13,176: half of one block's is 864, or 6.6%; the rest came off elsewhere
    model = tiny("llama-gqa", 3, torch.float64)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, :12] = 0
    report = run(model, "narrow", 1 - 864 / 13176, **EXACT)
    assert report.structure["narrowed"] == {"model.layers.1.self_attn.o_proj": 1}
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(CorankError, match="families"):
        recipe.get("best").recipe(families="all")
    with pytest.raises(CorankError, match="families=both needs allocate=lagrange or knapsack"):
        recipe.get("best").recipe(families="both", allocate="uniform")
    with pytest.raises(CorankError, match="share=none"):
        recipe.get("best").recipe(families="both", share="auto")
    folder = saved("llama-gqa", tmp_path / "dense")
    with pytest.raises(CorankError, match="families=factorize"):
        corank.compress(folder, "best", latency=0.8, families="both", out=tmp_path / "x", **DATA)
    with pytest.raises(CorankError, match="Neither channels nor heads"):
        corank.compress(folder, "best", keep=0.8, families="narrow", targets=("q", "k"), out=tmp_path / "x", **DATA)
    with pytest.raises(CorankError, match="smallest possible size"):
        corank.compress(folder, "best", keep=0.01, families="narrow", out=tmp_path / "x", **DATA)
    assert not (tmp_path / "x").exists()
    corank.compress(folder, "best", keep=0.6, families="both", out=tmp_path / "y", **DATA)
    with pytest.raises(CorankError, match="widths of their own"):
        read_specs(read_json(tmp_path / "y" / "config.json")["quantization_config"])


def test_the_command_line_says_what_became_of_the_blocks(tmp_path, capsys):
    folder = saved("llama-gqa", tmp_path / "dense")
    words = tmp_path / "words.txt"
    words.write_text(text(9000))
    given = [
        "--keep",
        "0.6",
        "--set",
        "families=both",
        "--no-eval",
        "--data",
        str(words),
        "--samples",
        "8",
        "--length",
        "32",
    ]
    assert main(["compress", str(folder), *given, "--out", str(tmp_path / "out")]) == 0
    assert "import corank, then" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made narrower and matrices replaced by factors of lower rank" in card
    assert main(["inspect", str(folder), "--method", "best", *given[:4], *given[5:]]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_two_processes_give_the_result_of_one(tmp_path):
    saved("llama-gqa", tmp_path / "dense", dtype=torch.float64)
    compress_both(0, str(tmp_path), "1")
    assert join(start_group(2, tmp_path / "meeting", compress_both, str(tmp_path), "2")) == [0, 0]
    plans = [read_json(tmp_path / n / "config.json")["quantization_config"]["plan"] for n in "12"]
    assert plans[0]["choices"] == plans[1]["choices"] and plans[0]["widths"] == plans[1]["widths"] != {}
    one, two = (logits(corank.load(tmp_path / n)[0]) for n in "12")
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-8)
