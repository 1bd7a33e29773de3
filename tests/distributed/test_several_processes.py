"""Several processes give the result of one, fail together with one sentence, and leave what can be gone on with.

Sums over calibration data are added up in another order, in float64; on float64 models everything behind them agrees to
that rounding, amplified by the eigenvectors of nearly singular matrices: 1e-8 of the largest entry is asked for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from several import DATA, RUNS, TEXT, compress_all, directory, dying, in_memory, refused, spoilt

import corank
from processes import join, start_group

AT_FOUR = ["one-shot", "anchored", "two-sided", "experts-anchored"]
TOLERANCE = 1e-8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory of models."""
    folder = tmp_path_factory.mktemp("room")
    for name in ("llama-gqa", "mixtral"):
        directory(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def room(models):
    """The same, with what one process makes of them."""
    compress_all(0, str(models), "1", list(RUNS))
    return models


def matrices(folder):
    """What every factorized layer computes."""
    model, _ = corank.load(folder, dtype="float64")
    return {name: m.dense_weight() for name, m in model.named_modules() if hasattr(m, "dense_weight")}


def assert_same(found, expected):
    assert found.keys() == expected.keys() and found
    for name, W in expected.items():
        torch.testing.assert_close(found[name], W, rtol=0, atol=TOLERANCE * float(W.abs().max()), msg=name)


def choices(folder):
    return [
        (r["name"], r["kind"], r["rank"], r["params"])
        for r in json.loads((folder / "report.json").read_text())["sites"]
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_result_of_one(size, room):
    """Seven batches: the shares are uneven."""
    runs = list(RUNS) if size == 2 else AT_FOUR
    assert join(start_group(size, room / f"meeting-{size}", compress_all, str(room), str(size), runs)) == [0] * size
    for run in runs:
        one, several = room / f"{run}-1", room / f"{run}-{size}"
        assert choices(several) == choices(one), run
        assert_same(matrices(several), matrices(one))
        assert not several.with_name(several.name + ".partial").exists()
        report = json.loads((several / "report.json").read_text())
        assert report["processes"] == size
        rows = [(room / f"{run}-{size}-rank{rank}.json").read_text() for rank in range(size)]
        assert len(set(rows)) == 1, "all processes have the same report"


def test_what_is_exact_stays_exact(room):
    """Without calibration nothing is added up, so that the files are the same bytes."""
    if not (room / "data-free-2").is_dir():
        pytest.skip("made by the test of two processes")
    one, two = (load_file(room / f"data-free-{size}" / "model.safetensors") for size in (1, 2))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_model_in_memory_is_compressed_in_every_process(tmp_path):
    assert join(start_group(2, tmp_path / "meeting", in_memory, str(tmp_path))) == [0, 0]
    (tmp_path / "alone").mkdir()
    in_memory(0, str(tmp_path / "alone"))
    ranks = [torch.load(tmp_path / f"memory-rank{rank}.pt") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    alone = torch.load(tmp_path / "alone" / "memory-rank0.pt")
    assert_same(ranks[0], alone)
    assert_same(matrices(tmp_path / "memory"), alone)


def test_bad_input_ends_all_processes_with_the_same_sentence(models):
    room = models
    spoilt(room / "broken")
    assert join(start_group(3, room / "meeting-bad", refused, str(room))) == [0, 0, 0]
    said = [json.loads((room / f"refused-rank{rank}.json").read_text()) for rank in range(3)]
    assert said[0] == said[1] == said[2]
    few, different, broken, search = said[0]
    assert "2 batches of calibration data cannot be shared by 3 processes" in few and "at most 2" in few
    assert "different settings" in different
    assert "not finite" in broken and "layer 0" in broken
    assert "in one process" in search
    assert not (room / "refused").exists() and not (room / "refused.partial").exists()


@pytest.mark.parametrize(
    ("run", "victim", "layer", "stage"), [("anchored", 1, 1, "factorize"), ("angular", 0, 2, "measure")]
)
def test_a_process_that_dies_ends_the_run_and_any_number_of_processes_finish_it(run, victim, layer, stage, room):
    group = start_group(2, room / f"meeting-{run}", dying, str(room), run, victim, layer, stage)
    codes = join(group)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 0
    sentence = (room / f"{run}-rank{1 - victim}.txt").read_text()
    assert "has ended" in sentence and "Run the same command again" in sentence
    out = room / f"{run}-killed"
    assert not out.exists() and out.with_name(out.name + ".partial").is_dir()
    seen = []
    model, settings = RUNS[run]
    corank.compress(room / model, out=out, progress=lambda *at: seen.append(at[:2]), **settings, **DATA)
    again = [at for at, name in seen if name == stage]
    assert again and min(again) >= layer, "finished blocks are not visited again"
    assert choices(out) == choices(room / f"{run}-1")
    assert_same(matrices(out), matrices(room / f"{run}-1"))


def test_torchrun_is_told_bad_input_once(models, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.text)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "corank", "compress"]
    options = f"--method svd-llm --keep 0.7 --out {tmp_path / 'out'} --quiet --no-eval --samples 1 --length 16"
    words += [str(models / "llama-gqa"), *options.split(), "--data", str(tmp_path / "text.txt")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode != 0
    assert done.stderr.count("corank: 1 batch of calibration data cannot be shared by 2 processes") == 1
    assert "exitcode  : 2" in done.stderr
    assert not list(tmp_path.glob("out*"))
