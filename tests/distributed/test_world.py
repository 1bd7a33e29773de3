"""Shares of work: every piece is somebody's, and nobody has much more than others."""

from __future__ import annotations

import pytest
import torch

from corank.engine.store import Activations
from corank.engine.world import ALONE, World, joined


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [7, 8, 20])
def test_shares_are_runs_that_cover_everything_once(size, count):
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_longest_tasks_are_apart():
    work = [9.0, 1.0, 9.0, 1.0, 2.0, 4.0]
    owners = World(0, 2).owners(work)
    assert owners == World(1, 2).owners(work) and owners[0] != owners[2]
    loads = [sum(w for w, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(2)]
    assert loads == [13.0, 13.0]
    assert World().owners(work) == [0] * 6


def test_a_process_alone_exchanges_nothing():
    with joined() as world:
        assert world is ALONE and world.first
        value = torch.ones(3)
        world.add([value])
        assert value.sum() == 3 and world.gather("x") == ["x"] and world.from_first(lambda: 5) == 5
        world.wait()


def test_activations_of_other_numbers_of_processes_are_read_if_they_are_complete(tmp_path):
    """Two processes with two batches each are followed by one with four; a boundary that one of them lacks does not count."""
    at = {i: [torch.full((2, 3), float(i)), torch.full((2, 3), -float(i))] for i in range(4)}
    kept = Activations(tmp_path, "factorize")

    def save(layer, numbers):
        kept.save(layer, [[at[i][s] + layer for i in numbers] for s in range(2)], numbers)

    save(1, range(0, 2)), save(1, range(2, 4)), save(2, range(2, 4))
    layer, streams = kept.load(2, range(1, 4), 4)
    assert layer == 1 and [len(stream) for stream in streams] == [3, 3]
    for i, dense, drifted in zip(range(1, 4), *streams, strict=True):
        assert torch.equal(dense, at[i][0] + 1) and torch.equal(drifted, at[i][1] + 1)
    assert kept.load(0, range(4), 4) is None and kept.load(2, range(5), 5) is None
    save(2, range(0, 2))
    assert kept.load(2, range(4), 4)[0] == 2 and kept.load(1, range(4), 4)[0] == 1
    kept.forget(2)
    assert kept.load(1, range(4), 4) is None and kept.load(9, range(4), 4)[0] == 2
    kept.clear()
    assert not list(tmp_path.iterdir())
