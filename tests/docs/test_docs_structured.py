"""The page on structured methods: its commands are run, and its table of classes is what comes out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import corank
from corank import recipe
from corank.cli import main
from corank.model import Text
from tiny import stand_in, text, tiny, tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "structured.md").read_text()
ROWS = re.findall(r"^\| `([\w-]+)` \|.*\| (N\d) \| (N\d|–) \|$", PAGE, flags=re.M)
DATA = dict(data=Text(text(), "words"), samples=6, length=16, batch=4)


def test_every_command_and_python_block_runs(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    stand_in(tmp_path, num_hidden_layers=4, intermediate_size=64)
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.S):
        if language == "python":
            exec(compile(code, "docs/structured.md", "exec"), {})
            continue
        for line in code.strip().splitlines():
            assert line.startswith("corank ")
            words = shlex.split(line)[1:]
            small = ["--samples", "8", "--length", "64"] if words[0] in ("compress", "inspect", "compare") else []
            assert main([*words, *small, "--quiet"]) == 0, f"{line}\n{capsys.readouterr().err}"
    printed = capsys.readouterr().out
    assert "Blocks that go: " in printed and "is ready: AutoModelForCausalLM" in printed
    assert all(method in printed for method in ("shortgpt", "flap", "svd-llm"))
    assert corank.Report.load(tmp_path / "shallow").structure["class"] == "N0"


def test_the_table_names_every_method_of_the_family():
    assert sorted(name for name, _, _ in ROWS) == [m.name for m in recipe.methods(family="structured")]


@pytest.mark.parametrize("name,own,uniform", ROWS)
def test_the_table_says_what_comes_out(name, own, uniform):
    for expected, settings in ((own, {}), (uniform, {"uniform": True})):
        if expected == "–":
            with pytest.raises(corank.CorankError, match="uniform=true is for an ordinary checkpoint"):
                corank.compress(tiny("llama-gqa"), name, keep=0.7, tokenizer=tokenizer(), **settings, **DATA)
            continue
        report = corank.compress(tiny("llama-gqa"), name, keep=0.7, tokenizer=tokenizer(), **settings, **DATA)
        assert report.structure["class"] == expected
