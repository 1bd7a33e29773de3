"""Every command of the page on healing is run, on a tiny stand-in for the model it names."""

from __future__ import annotations

import shlex

from pages import blocks, commands

from corank.cli import main
from tiny import stand_in


def test_the_page_on_healing_runs(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path / "cache", num_hidden_layers=4)
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "room").mkdir()
    monkeypatch.chdir(tmp_path / "room")
    for line in commands("docs/healing.md"):
        assert main([*shlex.split(line)[1:], "--quiet"]) == 0, f"{line}\n{capsys.readouterr().err}"
    for code in blocks("docs/healing.md", "python"):
        exec(compile(code, "docs/healing.md", "exec"), {})
    assert (tmp_path / "room" / "healed-by-blocks" / "healing.json").is_file()
