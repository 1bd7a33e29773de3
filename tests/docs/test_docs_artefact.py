"""The pages on evaluating and on serving are run from top to bottom, on a tiny stand-in for the model they name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from corank.cli import main
from tiny import stand_in, tokenizer

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty working directory, and a cache in which the alias is a tiny random model that can chat."""
    import datasets

    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    stand_in(tmp_path / "cache", words=words, eos_token_id=None)
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


class Page:
    """Runs the blocks of a page: shell, corank's commands, a server in the background, Python."""

    def __init__(self, name: str) -> None:
        self.text, self.namespace = (ROOT / "docs" / name).read_text(), {}
        self.server, self.address, self.ran = None, ADDRESS, []

    def run(self) -> None:
        try:
            for language, block in re.findall(r"```(bash|python)\n(.*?)```", self.text, flags=re.S):
                if language == "python":
                    exec(compile(block.replace(ADDRESS, self.address), "page", "exec"), self.namespace)
                    self.ran.append("python")
                else:
                    self.shell(block)
        finally:
            if self.server is not None:
                self.server.terminate()
                assert self.server.wait(300) == 0

    def shell(self, block: str) -> None:
        plain: list[str] = []
        for line in [*block.splitlines(), "corank"]:  # the last one flushes what came before
            if not line.startswith("corank"):
                plain.append(line)
                continue
            script = "\n".join(plain).replace(ADDRESS, self.address)
            plain = []
            if script.strip():
                done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, f"{script}\n{done.stderr}"
                self.ran.append(done.stdout)
            words = shlex.split(line.split(" #")[0])[1:]
            if words[:1] == ["serve"]:
                self.serve(words)
            elif words:
                assert main([*words, "--quiet"]) == 0, line
                self.ran.append(" ".join(words))

    def serve(self, words: list[str]) -> None:
        """Start it at a free port instead of the one on the page, and wait until it answers."""
        command = [sys.executable, "-m", "corank", *words, "--port", "0", "--engine", "builtin"]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = self.server.stdout.readline()
        self.address = re.search(r"http://[\d.]+:\d+", said).group()
        self.ran.append(" ".join(words))


def test_the_page_on_evaluating(room, monkeypatch, capsys):
    from lm_eval.tasks import _index

    # Of the tasks that come with lm-eval only those the page names: all of them take half a minute to index.
    every = _index.TaskIndex._iter_yaml_files
    monkeypatch.setattr(
        _index.TaskIndex,
        "_iter_yaml_files",
        staticmethod(lambda root: (p for p in every(root) if "lm_eval" not in p.parts or p.parent.name == "arc")),
    )
    page = Page("evaluation.md")
    page.run()
    printed = capsys.readouterr().out
    assert sum(ran.startswith("eval") for ran in page.ran) == 5 and "python" in page.ran
    assert "arc_easy" in printed and "acc_norm" in printed
    kept = json.loads((room / "capitals-lm-eval.json").read_text())
    assert kept["n-samples"]["capitals"]["effective"] == 3
    again = json.loads((room / "again-lm-eval.json").read_text())
    assert again["results"]["capitals"]["acc,none"] == kept["results"]["capitals"]["acc,none"]
    (local,) = room.glob("small-lm-eval-*.json")
    assert json.loads(local.read_text())["n-samples"]["arc_easy"]["effective"] == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page asks the server with curl")
def test_the_page_on_serving(room, capsys):
    page = Page("serving.md")
    page.run()
    assert [ran.split()[0] for ran in page.ran[:5]] == ["compress", *["export"] * 4]
    assert page.ran.count("python") == 4
    models, *rest = next(ran for ran in page.ran if ran.startswith('{"object": "list"')).split("}{")
    assert '"small"' in models and '"text_completion"' in "".join(rest) and "data: [DONE]" in "".join(rest)
    assert {p.name for p in room.iterdir()} == {"small", "small-onnx", "small-openvino", "small-torch", "small-dense"}
    sizes = {
        f: sum(p.stat().st_size for p in (room / f"small-{f}").glob("model*"))
        for f in ("onnx", "openvino", "torch", "dense")
    }
    assert all(size > 10_000 for size in sizes.values())
