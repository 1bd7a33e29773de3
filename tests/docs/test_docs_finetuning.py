"""The page on fine-tuning is run from top to bottom, on a tiny stand-in for the model it names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import corank
from corank.cli import main
from corank.factors import FactorizedLinear
from tiny import stand_in

pytest.importorskip("peft")
pytest.importorskip("torchao")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty working directory, and a cache in which the alias is a tiny random model."""
    stand_in(tmp_path / "cache", hidden_size=64, intermediate_size=96, num_key_value_heads=4)
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def shell(block: str) -> None:
    """Corank's commands in this process, the rest by bash; nothing is installed."""
    script: list[str] = []
    for line in [*block.splitlines(), "corank"]:  # the last one flushes what came before
        if not line.startswith("corank"):
            script += [] if line.startswith("pip ") else [line]
            continue
        if script:
            done = subprocess.run(["bash", "-ec", "\n".join(script)], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
        script = []
        words = shlex.split(line.split(" #")[0])[1:]
        assert not words or main([*words, "--quiet"]) == 0, line


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_page_on_fine_tuning(room, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    text = (ROOT / "docs" / "finetuning.md").read_text()
    namespace: dict = {}
    ran = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", text, flags=re.S):
        if language == "python":
            block = block.replace("report_to=[]", "report_to=[], use_cpu=True, disable_tqdm=True")
            exec(compile(block, "docs/finetuning.md", "exec"), namespace)
        else:
            shell(block)
        ran.append(language)
    assert ran.count("python") == 9 and ran.count("bash") == 4
    start, tuned, trained = (corank.load(place)[0] for place in ("small", "tuned", "trained"))
    ranks = {n: m.rank for n, m in start.named_modules() if isinstance(m, FactorizedLinear)}
    grown = {n: m.rank for n, m in tuned.named_modules() if isinstance(m, FactorizedLinear)}
    assert grown and all(rank == ranks[name] + 8 for name, rank in grown.items())
    same = {n: p for n, p in start.named_parameters()}
    assert any(not torch.equal(p, same[n]) for n, p in trained.named_parameters())
    pruned = [m.rank for m in corank.load("pruned")[0].modules() if isinstance(m, FactorizedLinear)]
    assert len(pruned) == 14 and set(pruned) == {16}
    linked = corank.load("linked")[0]
    assert {n: m.rank for n, m in linked.named_modules() if isinstance(m, FactorizedLinear)} == ranks
    assert namespace["account"].matrices.keys() == {"int8"} and namespace["account"].bits < 11
    assert {p.name for p in room.iterdir()} >= {
        "small",
        "adapter",
        "tuned",
        "trained",
        "ddp",
        "small-int8",
        "small-int4",
        "train.py",
    }
