"""The commands on a tiny model: what they write, what they print, and that JSON is JSON."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import corank
from corank import recipe
from corank.cli import build_parser, main
from tiny import saved, text

FAST = ["--samples", "4", "--length", "16", "--quiet"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    saved("llama-gqa", folder / "dense")
    (folder / "words.txt").write_text(text())
    (folder / "other.txt").write_text(text(seed=5))
    return folder


def compress(world, out, *more):
    return main(
        [
            "compress",
            str(world / "dense"),
            "--keep",
            "0.7",
            "--data",
            str(world / "words.txt"),
            "--out",
            str(out),
            *FAST,
            "--text",
            str(world / "other.txt"),
            "--windows",
            "4",
            "--window",
            "16",
            *more,
        ]
    )


def test_compress_writes_a_complete_directory(world, tmp_path, capsys):
    out = tmp_path / "small"
    assert compress(world, out) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("Parameters", "Bytes on disk", "FLOPs", "Perplexity", str(out)))
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "report.json", "report.html", "README.md", "recipe.yaml"} <= names
    report = json.loads((out / "report.json").read_text())
    assert set(report["accounting"]) >= {"sites", "model", "bytes", "flops_per_token", "break_even"}
    assert report["evaluation"]["dense"].keys() == report["evaluation"]["compressed"].keys() == {"other.txt"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4]])).logits).all()


def test_the_recipe_file_does_it_again(world, tmp_path):
    assert compress(world, tmp_path / "a", "--set", "pack=true", "--method", "svd-llm") == 0
    file = tmp_path / "a" / "recipe.yaml"
    assert main(["compress", "--recipe", str(file), "--out", str(tmp_path / "b"), "--no-eval", "--quiet"]) == 0
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_json_on_standard_output(world, tmp_path, capsys):
    for command in (
        ["methods"],
        ["inspect", str(world / "dense"), "--spectra"],
        [
            "inspect",
            str(world / "dense"),
            "--method",
            "svd-llm",
            "--keep",
            "0.7",
            "--data",
            str(world / "words.txt"),
            *FAST[:4],
        ],
        ["eval", str(world / "dense"), "--text", str(world / "other.txt"), "--window", "16", "--windows", "2"],
        ["generate", str(world / "dense"), "--prompt", "THE ", "--tokens", "3"],
    ):
        assert main([*command, "--json", "--quiet"]) == 0
        json.loads(capsys.readouterr().out)


def test_compare_makes_one_table_and_one_front_and_resumes(world, tmp_path, capsys):
    out = tmp_path / "comparison"
    command = [
        "compare",
        str(world / "dense"),
        "--methods",
        "svd,svd-llm,curing",
        "--keep",
        "0.9",
        "0.8",
        "--data",
        str(world / "words.txt"),
        "--text",
        str(world / "other.txt"),
        "--windows",
        "2",
        "--window",
        "16",
        "--out",
        str(out),
        *FAST,
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "svd-llm" in printed and (out / "pareto.png").is_file() and (out / "comparison.html").is_file()
    stamps = {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    assert main(command) == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir() if "curing" not in p.name} == {
        p: t for p, t in stamps.items() if "curing" not in p.name
    }


def test_plots_come_from_the_report_alone(world, tmp_path):
    out = tmp_path / "small"
    assert compress(world, out, "--no-eval") == 0
    for file in out.glob("*.safetensors"):
        file.unlink()
    assert main(["plot", str(out), "--out", str(tmp_path / "plots"), "--format", "svg"]) == 0
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"spectra.svg", "rank_map.svg", "loss_by_layer.svg"}


def test_inspect_writes_nothing(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "inspect",
                str(world / "dense"),
                "--method",
                "svd-llm",
                "--keep",
                "0.7",
                "--set",
                "allocate=lagrange",
                "--data",
                str(world / "words.txt"),
                *FAST,
            ]
        )
        == 0
    )
    assert "The plan" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_bench_verify_dequantize(world, tmp_path, capsys):
    out = tmp_path / "small"
    assert compress(world, out, "--no-eval") == 0
    assert main(["verify", str(out)]) == 0
    assert (
        main(
            [
                "bench",
                str(out),
                "--baseline",
                str(world / "dense"),
                "--prompt-tokens",
                "8",
                "--new-tokens",
                "4",
                "--repeats",
                "1",
                "--quiet",
            ]
        )
        == 0
    )
    assert "dense" in capsys.readouterr().out
    assert main(["dequantize", str(out), "--out", str(tmp_path / "plain")]) == 0
    small, _ = corank.load(out)
    plain, _ = corank.load(tmp_path / "plain")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(plain(input_ids=ids).logits, small(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [m.name for m in recipe.methods()])
def test_methods_shows_every_method_with_its_source(name, capsys):
    assert main(["methods", name]) == 0
    printed = capsys.readouterr().out
    method = recipe.get(name)
    assert method.cite in printed and all(p in printed for p in method.parameters)


def test_every_command_teaches_by_example():
    parser = build_parser()
    actions = next(a for a in parser._actions if a.dest == "command")
    for name, sub in actions.choices.items():  # type: ignore[union-attr]
        assert "examples:" in sub.format_help() and f"corank {name}" in sub.format_help()


def test_a_model_is_run_in_several_ways(world, tmp_path, capsys):
    small, dense = tmp_path / "small", str(world / "dense")
    assert compress(world, small, "--method", "svd", "--no-eval") == 0
    capsys.readouterr()
    sizes = ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1"]
    assert (
        main(["bench", str(small), "--baseline", dense, *sizes, "--runtime", "torch,packed", "--json", "--quiet"]) == 0
    )
    assert {row["model"] for row in json.loads(capsys.readouterr().out)} == {"dense", "small", "small (packed)"}
    said = []
    for runtime in ([], ["--runtime", "packed"]):
        assert main(["generate", str(small), "--prompt", "ALPHA", "--tokens", "4", "--json", *runtime, "--quiet"]) == 0
        said.append(json.loads(capsys.readouterr().out)["completion"])
    assert said[0] == said[1]
    assert main(["generate", str(small), "--prompt", "ALPHA", "--runtime", "paked", "--quiet"]) == 2
    assert "packed" in capsys.readouterr().err
