"""Sites that share a basis, from the recipe to the checkpoint that another process loads."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open

import corank
from corank import recipe
from corank.budget import count_break_even
from corank.engine.sharing import families_of
from corank.factors import KINDS, count_shared, weight_of
from corank.linalg import refit_output
from corank.model import Text, calibration, outline
from tiny import saved, text, tiny, tokenizer

TEXT = Text(text(), "words")
DATA = dict(data=TEXT, samples=6, length=16, batch=4)
RUNS = {
    "siblings": dict(method="svd-llm", keep=0.6, share="siblings", allocate="lagrange"),
    "layers": dict(method="basis-sharing", keep=0.6),
    "layers, refitted": dict(method="basis-sharing", keep=0.5, update=True),
    "auto": dict(method="svd-llm", keep=0.6, share="auto", allocate="lagrange"),
    "auto, two-sided": dict(method="kfac-svd", keep=0.5, share="auto", allocate="lagrange"),
    "affine": dict(method="lord", keep=0.6, share="layers", allocate="lagrange"),
    "no data": dict(method="joint-rank-k", keep=0.6, values=True),
}


def run(model, method, **settings):
    return corank.compress(model, method, tokenizer=tokenizer(), **settings, **DATA)


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            found |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return found


def inputs_of(model, names):
    """What the sites read on the calibration windows: name -> [tokens, n] float64."""
    windows = calibration(tokenizer(), TEXT, 6, 16, 0)
    found = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _m, args, n=n: found.__setitem__(n, args[0].detach().double().flatten(0, 1))
        )
        for n in names
    ]
    with torch.no_grad():
        model(input_ids=windows.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def groups(name, **settings):
    made = recipe.get("svd-llm").recipe(**settings)
    plan = outline(tiny(name).config)

    def short(s):
        parts = s.name.removeprefix("model.layers.").split(".")
        return f"{parts[0]}.{parts[-1].removesuffix('_proj')}"

    return [[tuple(short(s) for s in group) for group in family] for family in families_of(made, list(plan.sites))]


def test_which_sites_form_a_group():
    assert groups("llama-gqa") == []
    (siblings,) = groups("llama-gqa", share="siblings")
    assert siblings[:2] == [("0.q", "0.k", "0.v"), ("0.gate", "0.up")] and len(siblings) == 6
    (pairs,) = groups("llama-gqa", share="pairs")
    assert pairs[:2] == [("0.q", "0.k"), ("0.gate", "0.up")]
    (layers,) = groups("llama-gqa", share="layers")  # three layers: the last is alone; o and down never share
    assert layers == [("0.q", "1.q"), ("0.k", "1.k"), ("0.v", "1.v"), ("0.gate", "1.gate"), ("0.up", "1.up")]
    assert [len(g) for g in groups("llama-gqa", share="layers", group=3)[0]] == [3] * 5
    assert groups("llama-gqa", share="layers", group=1) == [[]]
    assert groups("llama-gqa", share="auto") == [siblings, layers]
    (fused,) = groups("gpt2-conv1d", share="layers")
    assert [g[0].rsplit(".", 1)[1] for g in fused] == ["c_attn", "c_fc"]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d", "qwen2-bias"])
@pytest.mark.parametrize("case", RUNS)
def test_losses_are_as_predicted_and_every_value_is_counted_once(case, name):
    settings = dict(RUNS[case])
    dense, model = tiny(name, dtype=torch.float64), tiny(name, dtype=torch.float64)
    report = run(model, settings.pop("method"), **settings)
    rows = {r["name"]: r for r in report.sites}
    shared = [r for r in report.sites if "basis" in r]
    if name != "gpt2-conv1d" and not case.startswith("auto"):  # its q, k and v are one matrix already
        assert shared
    sites = report.accounting["sites"]
    assert sites["compressed"] <= settings["keep"] * sites["dense"]
    stored = 0
    seen = inputs_of(model if "refitted" in case else dense, rows)
    for row in report.sites:
        old, new = dense.get_submodule(row["name"]), model.get_submodule(row["name"])
        bias = 0 if old.bias is None else old.bias.numel()
        stored += sum(t.numel() for t in new.state_dict().values()) - bias
        if row["kind"] == "dense":
            continue
        assert row["loss"] == pytest.approx(row["predicted_loss"], rel=1e-7, abs=1e-9)
        if case in ("siblings", "layers", "auto"):  # the true change of the layer's output on its own inputs
            X, W = seen[row["name"]], weight_of(old)
            realised = torch.linalg.norm((W - weight_of(new)) @ X.T) / torch.linalg.norm(W @ X.T)
            assert row["loss"] == pytest.approx(float(realised), rel=1e-7)
    assert stored == sites["compressed"] == sum(r["params"] for r in report.sites)
    for basis in {r["basis"] for r in shared}:
        members = [r for r in shared if r["basis"] == basis]
        assert [r["kind"] for r in members] == ["low_rank"] + ["shared"] * (len(members) - 1)
        assert members[0]["name"] == basis and len({r["rank"] for r in members}) == 1
        if case != "affine":
            ms, n, k = [r["shape"][0] for r in members], members[0]["shape"][1], members[0]["rank"]
            assert sum(r["params"] for r in members) == count_shared(ms, n, k) == k * (n + sum(ms))
        owner = model.get_submodule(basis)
        assert all(model.get_submodule(r["name"]).down is owner.down for r in members)


@pytest.mark.parametrize("case", ["siblings", "layers, refitted", "auto, two-sided", "affine", "no data"])
def test_streamed_is_in_memory_and_what_is_loaded_computes_the_same(case, tmp_path):
    name = "gpt2-conv1d" if case == "layers, refitted" else "llama-tied"
    folder = saved(name, tmp_path / "dense")
    settings = dict(RUNS[case])
    method = settings.pop("method")
    corank.compress(folder, method, out=tmp_path / "small", **settings, **DATA)
    model = tiny(name)
    run(model, method, out=tmp_path / "memory", **settings)
    streamed, memory = tensors(tmp_path / "small"), tensors(tmp_path / "memory")
    assert streamed.keys() == memory.keys()
    assert all(torch.equal(streamed[key], memory[key]) for key in streamed)
    corank.verify(tmp_path / "small")
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        loaded, _ = corank.load(tmp_path / "small")
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        dense = corank.dequantize(loaded)
        torch.testing.assert_close(dense(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    plan = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["plan"]
    shared = {n for n, c in plan["choices"].items() if c.get("basis")}
    specs = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["modules"]
    assert {n for n in shared if plan["choices"][n]["basis"] != n} == {
        n for n, s in specs.items() if s["kind"] == "shared"
    }


def test_without_this_package_in_a_process_of_its_own(tmp_path):
    """The shipped module computes with a basis of another layer as well."""
    folder = saved("llama-gqa", tmp_path / "dense")
    corank.compress(folder, "basis-sharing", keep=0.6, out=tmp_path / "small", **DATA)
    model, _ = corank.load(tmp_path / "small")
    ids = torch.arange(3, 30).view(1, -1)
    with torch.no_grad():
        torch.save((ids, model(input_ids=ids).logits), tmp_path / "expected.pt")
    script = """
        import sys, torch
        sys.modules["corank"] = None
        from transformers import AutoModelForCausalLM
        ids, expected = torch.load("expected.pt")
        model = AutoModelForCausalLM.from_pretrained("small", trust_remote_code=True)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layers", [2, 3])
def test_coefficients_refitted_to_what_the_compressed_model_feeds_them(layers):
    """B_l = W_l H A^T (A H A^T)^-1 with H of the inputs that the layers before it, compressed, produce."""
    dense, model = tiny("llama-gqa", dtype=torch.float64), tiny("llama-gqa", dtype=torch.float64)
    run(model, "basis-sharing", keep=0.5, update=True, layers=layers)
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    X = inputs_of(model, names)  # a layer's inputs do not depend on its own factors
    for name in names:
        new, W = model.get_submodule(name), weight_of(dense.get_submodule(name))
        assert new.kind == "shared"
        H = X[name].T @ X[name] / len(X[name])
        torch.testing.assert_close(
            new.up.weight, refit_output(W @ H, new.down.weight.detach(), H), rtol=1e-6, atol=1e-8
        )


def test_a_group_of_one_layer_is_svd_llm():
    first, second = tiny("llama-gqa"), tiny("llama-gqa")
    run(first, "svd-llm", keep=0.6)
    report = run(second, "basis-sharing", keep=0.6, layers=1)
    assert {r["kind"] for r in report.sites} == {"low_rank"}
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def equal_layers():
    """A model whose layers change nothing and have equal matrices: all of them read the same."""
    model = tiny("llama-gqa", dtype=torch.float64)
    first = model.model.layers[0].state_dict()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.load_state_dict(first)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def test_equal_layers_share_for_nothing():
    """Their basis serves all of them as a basis of its own would serve one, and the budget goes further."""
    targets = ("q", "gate", "up")
    alone = {r["name"]: r for r in run(equal_layers(), "svd-llm", keep=0.6, targets=targets).sites}
    for r in run(equal_layers(), "basis-sharing", layers=3, keep=0.6, targets=targets).sites:
        own = alone[r["name"]]
        assert r["basis"].startswith("model.layers.0.") and r["rank"] > own["rank"] and r["loss"] < own["loss"]
        assert [k for k, _ in r["curve"]] == [k for k, _ in own["curve"]]
        for (_, shared), (_, private) in zip(r["curve"], own["curve"], strict=True):
            assert shared == pytest.approx(private, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name,keep", [("llama-gqa", 0.8), ("qwen2-bias", 0.5)])
def test_auto_never_loses_more_than_sharing_nothing_and_is_not_beaten_by_sharing_all(name, keep):
    """On the sum that the allocator minimises, which is what really happens to the layers' outputs."""
    total = {}
    for share in ("none", "siblings", "layers", "auto"):
        report = run(tiny(name), "svd-llm", keep=keep, share=share, allocate="lagrange")
        assert report.accounting["sites"]["compressed"] <= keep * report.accounting["sites"]["dense"]
        total[share] = math.fsum(r["loss"] ** 2 for r in report.sites)
    assert total["auto"] <= total["none"] * (1 + 1e-5)
    assert total["auto"] <= 1.02 * min(total.values())  # greedy is optimal up to one step


def test_auto_with_the_uniform_allocator_shares_what_loses_less_at_its_cost():
    total = {s: run(tiny("llama-gqa"), "svd-llm", keep=0.6, share=s) for s in ("none", "auto")}
    none, auto = (math.fsum(r["loss"] ** 2 for r in total[s].sites) for s in ("none", "auto"))
    assert auto < none and any("basis" in r for r in total["auto"].sites)


def test_a_second_ratio_decomposes_nothing_again(tmp_path, monkeypatch):
    from corank.factorize import Spectral

    calls = []
    decompose = Spectral.decompose
    monkeypatch.setattr(Spectral, "decompose", lambda self, *a, **k: calls.append(1) or decompose(self, *a, **k))
    folder = saved("llama-gqa", tmp_path / "dense")
    settings = dict(share="auto", allocate="lagrange", cache=tmp_path / "cache", **DATA)
    corank.compress(folder, "svd-llm", keep=0.6, out=tmp_path / "a", **settings)
    assert len(calls) == 21 + 6 + 5  # sites, siblings, pairs of layers
    corank.compress(folder, "svd-llm", keep=0.5, out=tmp_path / "b", **settings)
    assert len(calls) == 32


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """It stops between the two layers of a group: the second reads a basis that has been written, in bfloat16."""
    folder = saved("llama-gqa", tmp_path / "dense", dtype=torch.bfloat16)
    settings = dict(keep=0.5, update=True, **DATA)
    corank.compress(folder, "basis-sharing", out=tmp_path / "whole", **settings)

    class Killed(BaseException):
        pass

    def watch(layer, stage, error):
        if (layer, stage) == (0, "factorize"):
            raise Killed

    with pytest.raises(Killed):
        corank.compress(folder, "basis-sharing", out=tmp_path / "parts", progress=watch, **settings)
    assert (tmp_path / "parts.partial").is_dir()
    corank.compress(folder, "basis-sharing", out=tmp_path / "parts", **settings)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def test_inspect_plans_with_shared_bases(tmp_path):
    from corank.inspection import describe, plan_for

    folder = saved("llama-gqa", tmp_path / "dense")
    shape = dict(samples=6, length=16, seed=0, batch=4, device="cpu", dtype=None, watch=lambda *a: None)
    settings = {"share": "auto", "allocate": "lagrange"}
    (tmp_path / "text.txt").write_text(text())
    plan = plan_for(folder, "svd-llm", {"keep": 0.6}, None, settings, data=str(tmp_path / "text.txt"), **shape)
    sizes = {"q": 24 * 24, "o": 24 * 24, "k": 12 * 24, "v": 12 * 24, "gate": 37 * 24, "up": 37 * 24, "down": 37 * 24}
    kept = sum(r["kept"] * 3 * sizes[r["role"]] for r in plan["roles"])
    assert kept == pytest.approx(plan["cost"]) and plan["cost"] <= plan["limit"]
    assert any(c.get("basis") for c in plan["choices"].values())
    corank.compress(folder, "basis-sharing", keep=0.6, out=tmp_path / "small", **DATA)
    kinds = {r["role"]: r["kind"] for r in describe(tmp_path / "small")["roles"]}
    assert kinds["q"] == "low_rank, shared" and kinds["o"] == "low_rank"


BAD = {
    "neighbours": (dict(method="svd-llm", share="sibling"), "nearest: siblings"),
    "no layers": (dict(method="basis-sharing", layers=0), "at least 1"),
    "columns": (dict(method="col-id", share="layers"), "truncates"),
    "anchored": (dict(method="svd-llm", share="siblings", target="anchored"), "target=dense"),
    "alternations": (dict(method="svd-llm", share="layers", alternations=1), "alternations=0"),
    "probes": (dict(method="svd-llm", share="auto", allocate="lems"), "lagrange"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_share_is_said_in_a_sentence(case):
    settings, words = BAD[case]
    with pytest.raises(corank.CorankError, match=words):
        run(tiny("llama-gqa"), keep=0.6, **settings)


def test_the_follower_kind_has_no_break_even_of_its_own():
    """A basis costs its owner alone: a pair of layers breaks even at a higher rank than a layer does."""
    m = n = 24
    assert count_break_even((2 * m, n), lambda M, n, k: count_shared([m, m], n, k)) == 15
    assert count_break_even((m, n), KINDS["low_rank"][0].count) == 11
