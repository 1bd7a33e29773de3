"""Every command of the README is run, on a tiny stand-in for the model it names."""

from __future__ import annotations

import shlex

from pages import commands

from corank.cli import main
from tiny import stand_in


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path / "cache", num_hidden_layers=4)
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "room").mkdir()
    monkeypatch.chdir(tmp_path / "room")
    for line in commands("README.md"):
        assert main([*shlex.split(line)[1:], "--quiet"]) == 0, f"{line}\n{capsys.readouterr().err}"
