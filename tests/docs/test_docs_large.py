"""The page on large models is run from top to bottom, torchrun included, on a tiny stand-in for the model it names."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from corank.cli import main
from tiny import stand_in

PAGE = Path(__file__).resolve().parents[2] / "docs" / "large-models.md"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_page_on_large_models(tmp_path, monkeypatch, capfd):
    stand_in(tmp_path / "cache")
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.chdir(room)
    ran: list[str] = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), flags=re.S):
        if language == "python":
            in_a_group_of_one(monkeypatch)
            exec(compile(block, str(PAGE), "exec"), {})
            ran.append("python")
        for line in block.splitlines() if language == "bash" else []:
            words = shlex.split(line)
            if words[0] == "torchrun":
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(torchrun, capture_output=True, text=True, timeout=600, env=environment)
                assert done.returncode == 0, done.stderr
                assert done.stdout.count("is ready") == 1, "one process speaks"
            else:
                assert main([*words[1:], "--quiet"]) == 0, line
            ran.append(words[0])
    assert ran == ["corank", "corank", "corank", "torchrun", "python"]
    assert "of the parameters are left" in capfd.readouterr().out
    for name in ("small", "smaller", "smallest", "shared", "from-python"):
        assert weights(room / name)
    assert sorted(p.name for p in room.iterdir()) == [
        "from-python",
        "shared",
        "small",
        "smaller",
        "smallest",
        "statistics",
    ]
    assert list((room / "statistics").rglob("inputs-*.safetensors"))


def in_a_group_of_one(monkeypatch) -> None:
    """What torchrun sets for each process, here for the only one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
