"""Healing in several processes is healing in one, up to the rounding of sums of gradients in double precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from healing_job import heal_a_directory, heal_in_memory, small

import corank
from factorized import mixed
from processes import join, start_group
from tiny import tiny, tokenizer

HOWS = ["kd", "block", "lora", "curing", "closed-form"]


def test_several_processes_do_what_one_does(tmp_path):
    for size in (1, 2, 3):  # of three, one has nothing to do in every other step
        group = start_group(size, tmp_path / f"meeting-{size}", heal_in_memory, str(tmp_path), str(size), HOWS)
        assert join(group) == [0] * size
    for how in HOWS:
        found = {
            (size, rank): torch.load(tmp_path / f"{how}-{size}-rank{rank}.pt", weights_only=True)
            for size in (1, 2, 3)
            for rank in range(size)
        }
        alone = found[1, 0]
        start = small(how).state_dict()
        assert any(not torch.equal(alone["state"][n], start[n]) for n in start), how
        for (size, rank), other in found.items():
            for mine, theirs in zip(alone["heldout"], other["heldout"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-9), (how, size)
            for n, p in alone["state"].items():
                torch.testing.assert_close(p, other["state"][n], rtol=1e-7, atol=1e-9, msg=f"{how} {size} {n}")
                assert torch.equal(other["state"][n], found[size, 0]["state"][n]), (how, size, rank, n)


@pytest.fixture
def room(tmp_path):
    teacher = tiny("llama-gqa")
    del teacher.model.layers[2:]
    teacher.config.num_hidden_layers = 2
    teacher.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    corank.checkpoint.save(mixed(), tokenizer(), tmp_path / "small")
    return tmp_path


def test_one_process_writes_and_all_are_told(room):
    assert join(start_group(2, room / "meeting", heal_a_directory, str(room), "healed")) == [0, 0]
    corank.checkpoint.verify(room / "healed")
    first, second = (json.loads((room / f"healed-rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first[1]) == 2 and "two sequences" in first[1][0]
    assert not list(room.glob("*.healing")) and not (room / "bad").exists()


def test_the_command_under_accelerate(room):
    (room / "text.txt").write_text("THE RANK OF A MATRIX " * 40)
    order = (
        "heal small --teacher dense --data text.txt --samples 8 --length 16 --epochs 1 --out healed --no-eval --quiet"
    )
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    run = subprocess.run(
        [sys.executable, *launch.split(), "-m", "corank", *order.split()],
        cwd=room,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("healed is ready") == 1
    corank.checkpoint.verify(room / "healed")
