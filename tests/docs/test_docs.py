"""Every command and every Python block in the docs is run, on a tiny stand-in for the model they name."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from pages import ROOT, blocks, commands

from corank.cli import main
from corank.recipe import _METHODS
from tiny import stand_in


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache in which the alias smollm2-135m is a tiny random model with a long context."""
    cache = tmp_path_factory.mktemp("cache")
    stand_in(cache, num_hidden_layers=4)
    return cache


@pytest.fixture(scope="module")
def room(home, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORANK_CACHE", str(home))
        patch.chdir(tmp_path_factory.mktemp("room"))
        yield


@pytest.mark.parametrize("page", ["docs/guide.md"])
def test_every_command_of_the_guide_runs(page, room, capsys):
    found = commands(page)
    assert len(found) > 10
    for line in found:
        assert main([*shlex.split(line)[1:], "--quiet"]) == 0, f"{line}\n{capsys.readouterr().err}"


def test_every_python_block_runs(home, tmp_path, monkeypatch):
    monkeypatch.setenv("CORANK_CACHE", str(home))
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    try:
        for code in [*blocks("docs/python.md", "python"), *blocks("README.md", "python")]:
            exec(compile(code, "docs/python.md", "exec"), namespace)
    finally:
        _METHODS.pop("rms-svd", None)
    assert namespace["report"].kept() <= 0.8


def test_generated_pages_are_up_to_date():
    result = subprocess.run([sys.executable, "docs/build.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_demo_runs(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CORANK_CACHE", str(home))
    assert main(["demo", "--out", str(tmp_path / "demo"), "--keep", "0.9", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "curing" in printed and "svd-llm" in printed and "report" in printed
