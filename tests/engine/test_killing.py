"""A compression that is killed at random moments, again and again, ends with the same bytes as one that is not."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

import corank
from corank.engine.directory import DirectorySink
from corank.model import Text
from processes import join, start
from tiny import saved, text

TEXT = Text(text(), "words")
RUNS = {
    "one visit": dict(method="svd-llm", keep=0.7),
    "two streams": dict(method="svd-llm", keep=0.7, target="anchored"),
    "two visits": dict(method="kfac-svd", keep=0.7, pack=True, allocate="lagrange"),
}
KILLS = 24


def compress_and_tell(source: str, out: str, diary: str, run: str) -> None:
    """Compress; the blocks that were finished on the way are written down one by one."""
    with open(diary, "a", buffering=1) as file:
        file.write("begin\n")

        def progress(layer, stage, error):
            if stage == "factorize":
                file.write(f"{layer}\n")

        corank.compress(source, out=out, data=TEXT, samples=6, length=16, batch=2, progress=progress, **RUNS[run])
        file.write("end\n")


def finished_blocks(out: Path) -> dict[int, tuple[int, int]]:
    """Number -> which file it is and when it was written, of every block that is complete."""
    folder = out.with_name(out.name + ".partial") / "blocks"
    notes = [note for note in folder.glob("*.json") if note.stem.isdigit()]
    stamps = {int(note.stem): note.with_suffix(".safetensors").stat() for note in notes}
    return {layer: (stamp.st_ino, stamp.st_mtime_ns) for layer, stamp in stamps.items()}


def same_files(out: Path, whole: Path) -> bool:
    names = sorted(file.name for file in whole.glob("*.safetensors*"))
    assert names and names == sorted(file.name for file in out.glob("*.safetensors*"))
    return all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A model of several shards and what becomes of it undisturbed; how long that takes from the first line to the last."""
    folder = tmp_path_factory.mktemp("killed")
    saved("llama-gqa", folder / "dense", shard="20KB")
    assert len(list((folder / "dense").glob("*.safetensors"))) > 3
    seconds = {}
    for run in RUNS:
        diary = folder / f"whole {run}.txt"
        process = start(compress_and_tell, str(folder / "dense"), str(folder / f"whole {run}"), str(diary), run)
        wait_for(diary, "begin")
        began = time.perf_counter()
        assert join([process]) == [0]
        seconds[run] = time.perf_counter() - began
    return folder, seconds


def wait_for(diary: Path, word: str) -> None:
    deadline = time.monotonic() + 240
    while not (diary.is_file() and word in diary.read_text()):
        assert time.monotonic() < deadline, f"{diary.name} never says {word!r}"
        time.sleep(0.002)


def test_a_run_killed_at_many_random_moments_ends_with_the_same_bytes(room):
    folder, seconds = room
    moments = random.Random(0)
    kills = attempt = 0
    while kills < KILLS:
        run = list(RUNS)[attempt % len(RUNS)]
        out, attempt = folder / f"killed {attempt}", attempt + 1
        done: dict[int, tuple[int, int]] = {}
        while not out.is_dir():
            diary = folder / f"{out.name} {kills} {time.monotonic_ns()}.txt"
            process = start(compress_and_tell, str(folder / "dense"), str(out), str(diary), run)
            wait_for(diary, "begin")
            if kills < KILLS:
                time.sleep(moments.uniform(0, seconds[run]))
                process.kill()
            (code,) = join([process])
            lines = diary.read_text().split()
            assert code == -9 or (code == 0 and "end" in lines)
            kills += code == -9
            made = [int(line) for line in lines if line.isdigit()]
            assert not set(made) & set(done), "a finished block is not made again"
            after = finished_blocks(out)
            if not out.is_dir():
                assert done.items() <= after.items(), "nor is its file written again"
            done = after or done
        assert same_files(out, folder / f"whole {run}"), f"{run} after {kills} kills"
        assert attempt < 20 * KILLS


@pytest.mark.parametrize("moment", ["before the block is written", "after it"])
def test_activations_and_blocks_are_never_apart(moment, room, monkeypatch):
    """Activations in front of the next block are written before the block, and the older ones kept until it is."""
    folder, _ = room
    out = folder / f"apart {moment}"
    common = dict(data=TEXT, samples=6, length=16, batch=2, **RUNS["two streams"])
    put = DirectorySink.put

    def interrupted(self, layer, *args):
        if moment == "after it":
            put(self, layer, *args)
        if layer == 1:
            raise KeyboardInterrupt
        if moment != "after it":
            put(self, layer, *args)

    monkeypatch.setattr(DirectorySink, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corank.compress(folder / "dense", out=out, **common)
    assert len(finished_blocks(out)) == 1 + (moment == "after it")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    corank.compress(folder / "dense", out=out, **common)
    assert same_files(out, folder / "whole two streams")
