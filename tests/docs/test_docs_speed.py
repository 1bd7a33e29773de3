"""The page on speed is run from top to bottom; the device of this machine is a slow one that is made up."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import corank
from corank.cli import main
from corank.timing import Device, device
from tiny import stand_in

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def room(tmp_path, monkeypatch):
    stand_in(tmp_path / "cache")
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))

    def slow(where: torch.device, dtype: torch.dtype) -> Device:
        name = device.device_name(where)
        return Device(name, str(dtype)[6:], 1e7, 1e7, 1e-5, threads=torch.get_num_threads(), torch=torch.__version__)

    monkeypatch.setattr(device, "measure_device", slow)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def test_the_page_on_speed(room, capsys):
    page = (ROOT / "docs" / "speed.md").read_text()
    ran = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page, flags=re.S):
        if language == "python":
            exec(compile(block, "docs/speed.md", "exec"), {})
            continue
        for line in block.splitlines():
            words = shlex.split(line.split(" #")[0])[1:]
            assert main([*words, "--quiet"]) == 0, f"{line}\n{capsys.readouterr().err}"
            ran.append(words[0])
    assert ran == ["compress", "bench", "bench", "compress", "compress", "bench", "bench", "generate"]
    said = capsys.readouterr().out
    assert "memory only" in said and "of the floor" in said and "None" in said
    latency = corank.Report.load(room / "fast").accounting["latency"]
    assert latency["compressed"] <= 0.7 * latency["dense"] and latency["tokens"] == 256
