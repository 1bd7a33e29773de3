"""One score map, any size: `compress --method acip` and `prune` against each other and against masked forwards."""

from __future__ import annotations

import json

import pytest
import torch

import corank
from corank.cli import main
from corank.errors import CorankError
from corank.gates import Directions, Gates, StraightThrough
from corank.gates.any_size import FILE, load_map
from corank.gates.components import prior
from corank.gates.scores import Costs
from corank.model import Text
from tiny import saved, text, tiny, tokenizer, windows

DATA = dict(data=Text(text(), "words"), samples=6, length=16, batch=4, steps=8)
IDS = windows().ids


def logits(model):
    if not hasattr(model, "forward"):
        model = corank.load(model)[0]
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A float64 model with biases and grouped queries: dense, and compressed to all sizes by one map."""
    folder = tmp_path_factory.mktemp("sizes")
    saved("qwen2-bias", folder / "dense", dtype=torch.float64)
    for keep in (1.0, 0.85, 0.6):
        corank.compress(folder / "dense", "acip", keep=keep, out=folder / f"{keep}", dtype="float64", **DATA)
    return folder


def test_pruning_is_compressing_from_the_same_map(made, tmp_path):
    """From all components, from fewer of them, and in two steps; against the factors cut from the dense matrices."""
    corank.prune(made / "1.0", keep=0.6, out=tmp_path / "a")
    corank.prune(made / "0.85", remove=0.4, out=tmp_path / "b")
    corank.prune(made / "0.85", keep="70%", out=tmp_path / "c")
    report = corank.prune(tmp_path / "c", keep=0.6, out=tmp_path / "d")
    expected = logits(made / "0.6")
    for name in "abd":
        torch.testing.assert_close(logits(tmp_path / name), expected, rtol=1e-9, atol=1e-9)
    compressed = json.loads((made / "0.6" / "report.json").read_text())
    assert report.accounting["sites"] == compressed["accounting"]["sites"]
    assert report.accounting["model"] == compressed["accounting"]["model"]
    assert report.accounting["flops_per_token"] == compressed["accounting"]["flops_per_token"]
    for row, other in zip(report.sites, compressed["sites"], strict=True):
        assert (row["kind"], row["rank"], row["params"]) == (other["kind"], other["rank"], other["params"])
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-7)
    corank.verify(tmp_path / "d")
    assert json.loads((tmp_path / "d" / "config.json").read_text())["quantization_config"]["recipe"]["budget"] == {
        "keep": 0.6,
        "scope": "sites",
    }


def test_a_materialised_model_is_the_masked_forward(made, tmp_path):
    """Against gates of 0 and 1 on the dense model; a matrix that is stored as it is keeps all its components."""
    stored = load_map(made / "1.0")
    dense = corank.load(made / "dense")[0]
    report = corank.prune(made / "1.0", keep=0.5, out=tmp_path / "small")
    rows = {row["name"]: row for row in report.sites}
    places = []
    for name, up in stored.up.items():
        places.append(Directions(name, name, up, up.T @ dense.get_submodule(name).weight.detach()))
    gates = Gates(places, StraightThrough(), dtype=torch.float64)
    kept = stored.scores.kept(gates.places, int(0.5 * gates.dense))
    with torch.no_grad():
        for name, theta in gates.theta.items():
            theta.fill_(1.0 if rows[name]["kind"] == "dense" else -1.0)
            theta[kept[name]] = 1.0
    assert {row["kind"] for row in report.sites} == {"dense", "low_rank"}
    with gates.attached(dense):
        torch.testing.assert_close(logits(tmp_path / "small"), logits(dense), rtol=1e-9, atol=1e-9)
    assert gates.size() == report.accounting["sites"]["compressed"] <= 0.5 * gates.dense


def test_keeping_everything_is_the_identity(made, tmp_path):
    corank.prune(made / "1.0", keep=1.0, out=tmp_path / "same")
    assert torch.equal(logits(tmp_path / "same"), logits(made / "dense"))
    corank.prune(tmp_path / "same", keep=0.6, out=tmp_path / "then")
    torch.testing.assert_close(logits(tmp_path / "then"), logits(made / "0.6"), rtol=1e-9, atol=1e-9)


def test_sizes_are_monotone_and_kept_sets_nested(made):
    stored = load_map(made / "1.0")
    report = json.loads((made / "1.0" / "report.json").read_text())
    shapes = {row["name"]: tuple(row["shape"]) for row in report["sites"]}
    costs = {n: Costs(lambda r, n=n: stored.cost(r, shapes[n])) for n in shapes}
    before, size = None, 0
    for limit in range(0, stored.limit + 1, 97):
        kept = stored.scores.kept(costs, limit)
        now = sum(costs[n].cost(len(k)) for n, k in kept.items())
        assert size <= now <= limit
        assert all(torch.equal(k, torch.arange(len(k))) for k in kept.values())  # in the order in which they stay
        if before is not None:
            assert all(len(before[n]) <= len(k) for n, k in kept.items())
        before, size = kept, now


def test_pivoted_storage_is_counted_and_pruned(tmp_path):
    saved("gpt2-conv1d", tmp_path / "dense", dtype=torch.float64)
    for keep in (0.8, 0.5):
        corank.compress(
            tmp_path / "dense", "acip", keep=keep, pack=True, out=tmp_path / f"{keep}", dtype="float64", **DATA
        )
    report = corank.prune(tmp_path / "0.8", keep=0.5, out=tmp_path / "pruned")
    torch.testing.assert_close(logits(tmp_path / "pruned"), logits(tmp_path / "0.5"), rtol=1e-8, atol=1e-8)
    loaded = corank.load(tmp_path / "pruned")[0]
    counted = 0
    for row in report.sites:
        state = loaded.get_submodule(row["name"]).state_dict()
        counted += sum(t.numel() for leaf, t in state.items() if not leaf.endswith("bias"))
        assert row["kind"] in ("row_pivoted", "dense")
    assert counted == report.accounting["sites"]["compressed"] <= 0.5 * report.accounting["sites"]["dense"]


def test_an_interrupted_training_goes_on(made, tmp_path):
    class Stop(Exception):
        pass

    def run(name, stop_at=0):
        seen = []

        def note(layer, stage, error):
            seen.append(stage)
            if stop_at and seen.count("train") == stop_at:
                raise Stop

        try:
            corank.compress(made / "dense", "acip", keep=0.6, out=tmp_path / name, progress=note, **DATA)
        except Stop:
            assert list((tmp_path / f"{name}.partial").rglob("gates-*.pt"))
            return 0
        return seen.count("train")

    whole = run("whole")
    run("x", stop_at=whole - 2)
    assert run("x") < whole  # the teacher's predictions once more, and the steps that were left
    assert torch.equal(logits(tmp_path / "x"), logits(tmp_path / "whole"))
    assert not (tmp_path / "x.partial").exists()


def test_the_map_is_trained_once_for_all_sizes(made, tmp_path):
    stages = []

    def note(layer, stage, error):
        stages.append(stage)

    for keep in (0.9, 0.5):
        corank.compress(
            made / "dense", "acip", keep=keep, out=tmp_path / f"{keep}", cache=tmp_path / "cache", progress=note, **DATA
        )
        assert ("train" in stages) == (keep == 0.9)
        stages.clear()


@pytest.mark.parametrize("settings", [{"loss": "text"}, {"start": "svd"}, {"prior": "none"}, {"multiple_of": 4}])
def test_settings(settings, tmp_path):
    model = tiny("llama-gqa")
    report = corank.compress(model, "acip", keep=0.6, out=tmp_path / "x", tokenizer=tokenizer(), **DATA, **settings)
    sites = report.accounting["sites"]
    assert 0.4 * sites["dense"] <= sites["compressed"] <= 0.6 * sites["dense"]
    assert (tmp_path / "x" / FILE).is_file()
    torch.testing.assert_close(logits(tmp_path / "x"), logits(model))
    smaller = corank.prune(tmp_path / "x", keep=0.5, out=tmp_path / "y")
    step = settings.get("multiple_of", 1)
    for each in (report, smaller):
        assert all(row["rank"] % step == 0 or row["kind"] == "dense" for row in each.sites)


def test_the_clock_ends_the_training(tmp_path):
    stages = []
    settings = {**DATA, "steps": 400, "minutes": 1e-6}
    model = tiny("llama-gqa")
    report = corank.compress(
        model, "acip", keep=0.6, tokenizer=tokenizer(), progress=lambda *told: stages.append(told[1]), **settings
    )
    assert 1 <= stages.count("train") < 20
    assert report.accounting["sites"]["compressed"] <= 0.6 * report.accounting["sites"]["dense"]


def test_a_refit_leaves_no_map(tmp_path):
    """What is fitted to the inputs at one size is not what another size would be."""
    corank.compress(tiny("llama-gqa"), "acip", keep=0.6, refit=True, out=tmp_path / "x", tokenizer=tokenizer(), **DATA)
    with pytest.raises(CorankError, match="no score map"):
        corank.prune(tmp_path / "x", keep=0.5, out=tmp_path / "y")


def test_the_prior_is_the_order_of_worth():
    found = prior({"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([1.0, 2.0])})
    assert {n: p.tolist() for n, p in found.items()} == {"a": [1.0, 0.25], "b": [0.5, 0.75]}


def test_bad_sizes_and_directories(made, tmp_path):
    def refused(match, source="0.85", **given):
        with pytest.raises(CorankError, match=match):
            corank.prune(made / source, out=tmp_path / "x", **given)
        assert not (tmp_path / "x").exists()

    refused("no score map .* `corank compress MODEL --method acip", "dense", keep=0.5)
    refused(r"holds 0\.8\d+ of the parameters .* asks for more", keep=0.9)
    refused("Give exactly one", keep=0.5, remove=0.5)
    refused("Give exactly one")
    refused("outside", keep=1.5)
    refused("has .* already", params=100, scope="model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(CorankError, match="not empty"):
        corank.prune(made / "0.85", keep=0.5, out=tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "match,model,settings",
    [
        ("causal language model", "bert", {}),
        ("lies outside", "llama-gqa", {"targets": ("lm_head",)}),
        ("share", "llama-gqa", {"share": "pairs"}),
        ("'acip'|start", "llama-gqa", {"start": "nowhere"}),
        ("to=", "llama-gqa", {"to": 1.5}),
        ("loss", "llama-gqa", {"loss": "none"}),
    ],
)
def test_what_acip_refuses(match, model, settings):
    with pytest.raises(CorankError, match=match):
        corank.compress(tiny(model), "acip", keep=0.6, tokenizer=tokenizer(), **DATA, **settings)


def test_the_command(made, tmp_path, capsys):
    assert main(["prune", str(made / "0.85"), "--keep", "0.7", "--out", str(tmp_path / "x")]) == 0
    assert "of the parameters" not in capsys.readouterr().err
    assert main(["prune", str(made / "0.85"), "--keep", "0.7", "--out", str(tmp_path / "y"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["budget"] == {"keep": 0.7, "scope": "sites"}
    assert told["accounting"]["sites"]["compressed"] <= 0.7 * told["accounting"]["sites"]["dense"]
    assert main(["prune", str(made / "dense"), "--keep", "0.7", "--out", str(tmp_path / "z")]) == 2
    assert capsys.readouterr().err.startswith("corank: ")
