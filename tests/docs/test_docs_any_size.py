"""The page on any size: its commands and its Python blocks are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

import corank
from corank import recipe
from corank.cli import main
from tiny import stand_in

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "any-size.md").read_text()


def test_every_command_and_python_block_runs(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    stand_in(tmp_path)
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.S):
        if language == "python":
            exec(compile(code, "docs/any-size.md", "exec"), {})
            continue
        for line in code.strip().splitlines():
            assert line.startswith("corank ")
            words = shlex.split(line)[1:]
            small = ["--samples", "8", "--length", "64"] if words[0] in ("compress", "heal") else []
            fast = ["--set", "steps=8"] if words[0] == "compress" else []
            assert main([*words, *small, *fast, "--quiet"]) == 0, f"{line}\n{capsys.readouterr().err}"
    kept = {}
    folders = (
        "any",
        "any-80",
        "any-63",
        "any-70",
        "every",
        "every-50",
        "every-40",
        "units",
        "units-80",
        "units-60",
        "units-70",
    )
    for folder in folders:
        sites = corank.Report.load(tmp_path / folder / "report.json").accounting["sites"]
        kept[folder] = sites["compressed"] / sites["dense"]
    limits = {folder: int(folder.partition("-")[2] or 100) / 100 for folder in folders} | {"any": 0.9}
    assert all(share <= limits[folder] for folder, share in kept.items())
    assert all(share > limits[folder] - 0.05 for folder, share in kept.items() if not folder.startswith("units"))
    assert corank.Report.load(tmp_path / "units-60" / "report.json").structure["class"] == "N0"
    assert not (tmp_path / "every-40-healed" / "any-size").exists()


def test_the_table_of_settings_names_what_there_is():
    method = recipe.get("acip")
    for row in re.findall(r"^\| (`.+?`)[^|]*\|", PAGE, flags=re.M):
        for name, value in re.findall(r"`(\w+)=(\w[\w.]*)`", row):
            known = {**method.common, **method.parameters}
            assert name in known
            if name != "pack":
                assert str(known[name]) == value
