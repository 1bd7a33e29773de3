"""What a user leaves to the machine: multiples of ranks, threads, and whether 16 bits are worth timing here."""

from __future__ import annotations

import json

import pytest
import torch

import corank
import corank.order
from corank.cli import main
from corank.commands.measuring import threads
from corank.errors import CorankError
from corank.order import Order
from corank.recipe import get
from corank.timing import Device, drawback, instructions
from tiny import saved, text, tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    saved("llama-gqa", folder / "dense")
    (folder / "text.txt").write_text(text())
    return folder


@pytest.fixture
def devices(monkeypatch):
    """A machine of each dtype, and what was asked for."""
    asked = []

    def find(name, dtype):
        asked.append((name, dtype))
        quantum = 5 if name == "other" else 4 if dtype == torch.float32 else 3
        return Device("made up", str(dtype)[6:], 1e7, 1e7, 1e-5, quantum=quantum)

    monkeypatch.setattr(corank.order, "find_device", find)
    return asked


def test_ranks_are_multiples_of_what_this_machine_likes(place, tmp_path, devices, capsys):
    flags = ["--data", str(place / "text.txt"), "--samples", "8", "--length", "32", "--no-eval", "--quiet"]
    command = ["compress", str(place / "dense"), "--method", "svd-llm", "--keep", "0.6", *flags]
    assert main([*command, "--set", "multiple_of=auto", "--out", str(tmp_path / "small")]) == 0
    report = corank.Report.load(tmp_path / "small")
    low = [row for row in report.sites if row["kind"] != "dense" and row["rank"] < row["max_rank"]]
    assert low and all(row["rank"] % 4 == 0 for row in low)
    assert set(devices) == {(None, torch.float32)}
    # what is kept is the number: the same command gives the same model on another machine
    assert report.parameters["multiple_of"] == 4
    recipe = tmp_path / "small" / "recipe.yaml"
    assert "multiple_of: 4" in recipe.read_text() and "auto" not in recipe.read_text()
    model, _ = corank.load(place / "dense", dtype="bfloat16")
    options = {"keep": 0.6, "data": place / "text.txt", "samples": 8, "length": 32, "multiple_of": "auto"}
    report = corank.compress(model, "svd-llm", tokenizer=tokenizer(), **options)
    assert report.parameters["multiple_of"] == 3 and devices[-1] == (None, torch.bfloat16)


def test_a_budget_of_time_says_which_machine(devices):
    budget = {"latency": 0.7, "latency_device": "other"}
    order = Order.take("svd-llm", budget, None, {"multiple_of": "auto", "allocate": "lagrange"}, "builtin")
    assert order.recipe.multiple_of == 0
    there = order.aligned(torch.float32)
    assert there.recipe.multiple_of == 5 == there.settings["multiple_of"] and devices == [("other", torch.float32)]
    assert there.aligned(torch.float32) is there and order.settings["multiple_of"] == "auto"
    best = Order.take("best", {"keep": 0.8}, None, {"multiple_of": "auto"}, "builtin").aligned(torch.bfloat16)
    assert best.recipe.fallback is None or best.recipe.fallback.multiple_of == best.recipe.multiple_of == 3


@pytest.mark.parametrize("value", ["automatic", "-1", "1.5"])
def test_other_words_are_refused(value):
    with pytest.raises(CorankError, match="multiple_of"):
        get("svd-llm").recipe(multiple_of=value)
    with pytest.raises(CorankError, match="floor"):  # no other setting may be left open
        get("svd-llm").recipe(floor="auto")


@pytest.mark.parametrize(
    ("has", "dtype", "said"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, None),
        ({"bf16": True, "architecture": "aarch64"}, torch.bfloat16, None),
        ({"avx2": True, "amx_bf16": False}, torch.bfloat16, "no instructions for bfloat16"),
        ({"amx_bf16": True}, torch.float16, "no instructions for float16"),
        ({"avx2": True}, torch.float32, None),
    ],
)
def test_a_processor_without_the_instructions_is_named(has, dtype, said, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    found = drawback(dtype)
    assert found is None if said is None else said in found and "\n" not in found
    assert drawback(dtype, "cuda") is None
    if said is None and dtype != torch.float32:
        assert instructions(dtype) == tuple(name for name in has if has[name] is True)


def test_a_version_of_torch_that_does_not_say_is_not_guessed_at(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert instructions(torch.bfloat16) is None and drawback(torch.bfloat16) is None


@pytest.mark.parametrize("has", [{}, {"amx_bf16": True}])
def test_bench_takes_a_dtype_and_threads(place, has, capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    before = torch.get_num_threads()
    command = ["bench", str(place / "dense"), "--baseline", str(place / "dense"), "--dtype", "bfloat16"]
    sizes = ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--json", "--quiet"]
    assert main([*command, *sizes, "--threads", "2"]) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert all(row["dtype"] == "bfloat16" and row["bound"]["threads"] == 2 for row in rows)
    assert said.err.count("no instructions for bfloat16") == (not has) and torch.get_num_threads() == before
    assert main([*command, *sizes, "--threads", "3"]) == 2
    assert "give 1 to 2" in capsys.readouterr().err
    assert main([*command[:-1], "int8", *sizes]) == 2
    assert "float32, bfloat16 or float16" in capsys.readouterr().err


def test_threads_are_given_back_after_a_failure():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(1):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with pytest.raises(CorankError, match="--threads 0"), threads(0):
        pass
