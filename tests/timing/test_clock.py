"""Time as a budget: the allocators count nanoseconds, never exceed them, and leave dense what cannot be faster."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

import corank
from corank.budget import ALLOCATORS, MEASURED, Curve
from corank.cli import main
from corank.errors import CorankError
from corank.factors import LowRank
from corank.model import Site
from corank.report.summary import predicted_speed
from corank.timing import Device, break_even_rank, matrix_seconds
from corank.timing.clock import Clock
from tiny import saved, text

# A device on which even tiny matrices take longer than launches.
SLOW = Device("slow", "float32", bytes_per_s=1e7, flops_per_s=1e7, kernel_s=1e-5, quantum=4)
SHAPES = {"a": (24, 40), "b": (40, 24), "c": (32, 32), "d": (8, 16)}


def site(name: str, shape: tuple[int, int], **rest) -> Site:
    return Site(name, name, 0, shape, name, False, **rest)


SITES = [site(name, shape) for name, shape in SHAPES.items()]


def curves(clock: Clock, seed: int, step: int = 1) -> list[Curve]:
    """Falling losses, not always convex."""
    rng = np.random.default_rng(seed)
    found = []
    for each in SITES:
        ranks = np.arange(0, min(each.shape) + 1, step)
        loss = np.sort(rng.random(len(ranks)))[::-1].copy()
        loss[-1] = 0.0
        curve = Curve.from_count(each.name, each.shape, LowRank.count, loss, ranks, role=each.role)
        found.append(clock.priced(curve, each, "low_rank"))
    return found


def spent(found: list[Curve], ranks: dict[str, int | None]) -> int:
    return sum(curve.cost_at(ranks[curve.site]) for curve in found)


@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_costs_are_the_nanoseconds_of_the_time_model(tokens):
    clock = Clock(SLOW, 2, tokens)
    for curve in curves(clock, 0):
        expected = [1e9 * matrix_seconds(curve.shape, r, SLOW, 2 * tokens) for r in curve.ranks.tolist()]
        assert np.all(curve.cost - np.array(expected) >= 0) and np.all(curve.cost - np.array(expected) < 1)
        assert curve.dense_cost == np.ceil(1e9 * matrix_seconds(curve.shape, None, SLOW, 2 * tokens))
    assert clock.limit(SITES, 0.7) == int(0.7 * sum(curve.dense_cost for curve in curves(clock, 0)))


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_finds_what_trying_everything_finds(share, seed):
    clock = Clock(SLOW)
    found = curves(clock, seed, step=4)
    limit = clock.limit(SITES, share)
    options = [[*(r for r in c.ranks.tolist() if c.cost_at(r) < c.dense_cost), None] for c in found]
    least = min(
        sum(curve.loss_at(r) for curve, r in zip(found, ranks, strict=True))
        for ranks in itertools.product(*options)
        if sum(curve.cost_at(r) for curve, r in zip(found, ranks, strict=True)) <= limit
    )
    exact = ALLOCATORS["knapsack"](found, limit, bins=1 << 16)
    greedy = ALLOCATORS["lagrange"](found, limit)
    loss = [sum(c.loss_at(ranks[c.site]) for c in found) for ranks in (exact, greedy)]
    # costs are divided into 65536 parts, so that a choice that just fits may be missed
    assert least <= loss[0] <= loss[1] and loss[0] <= least + 0.02


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - set(MEASURED)))
@pytest.mark.parametrize("tokens", [1, 64])
def test_no_allocator_exceeds_the_time(name, tokens):
    clock = Clock(SLOW, 1, tokens)
    for seed, share in itertools.product(range(3), (0.5, 0.65, 0.8, 0.95)):
        found = curves(clock, seed)
        limit = clock.limit(SITES, share)
        ranks = ALLOCATORS[name](found, limit, floor=0.0, multiple_of=4)
        assert spent(found, ranks) <= limit
        for curve in found:
            rank = ranks[curve.site]
            assert rank is None or (rank % 4 == 0 or rank == min(curve.shape))
            assert rank is None or curve.cost_at(rank) < curve.dense_cost


def test_what_cannot_be_faster_stays_dense():
    launches = Device(**{**SLOW.to_json(), "kernel_s": 1e-4})
    clock = Clock(launches)
    assert break_even_rank(SHAPES["d"], launches) is None and break_even_rank(SHAPES["c"], launches) is not None
    for seed in range(5):
        found = curves(clock, seed)
        limit = clock.limit(SITES, 0.93)
        assert ALLOCATORS["lagrange"](found, limit)["d"] is None
        assert ALLOCATORS["uniform"](found, limit)["d"] is None
    none = Clock(Device(**{**SLOW.to_json(), "kernel_s": 1.0}))
    with pytest.raises(CorankError, match="4 of the 4 matrices are too small .* latency_batch .* keep="):
        none.require(curves(none, 0), none.limit(SITES, 0.9), 1)


def test_experts_and_heads_are_counted_by_their_tokens():
    clock = Clock(SLOW, 2, 50)
    whole, expert = site("w", (32, 32)), site("e", (32, 32), share=0.25)
    seconds = [clock.seconds(s, "dense", None) - 1e-5 for s in (whole, expert)]
    assert seconds[0] == pytest.approx(4 * seconds[1])
    assert clock.seconds(site("lm_head", (32, 32)), "dense", None) == matrix_seconds((32, 32), None, SLOW, 2)
    table = site("embed", (32, 500), form="embedding")
    assert clock.seconds(table, "dense", None) < clock.seconds(table, "low_rank", 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    saved("llama-gqa", folder / "dense")
    (folder / "text.txt").write_text(text())
    (folder / "slow.json").write_text(json.dumps(SLOW.to_json()))
    return folder


@pytest.mark.parametrize(("method", "settings"), [("svd-llm", {}), ("svd-llm", {"pack": True}), ("best", {})])
def test_a_model_is_compressed_to_a_time(place, tmp_path, method, settings):
    report = corank.compress(
        place / "dense",
        method,
        latency=0.7,
        latency_batch=2,
        latency_device=str(place / "slow.json"),
        out=tmp_path / "small",
        data=place / "text.txt",
        samples=8,
        length=32,
        allocate="lagrange",
        **settings,
    )
    latency = report.accounting["latency"]
    assert latency["compressed"] <= 0.7 * latency["dense"] and latency["speedup"] >= 1 / 0.7
    assert latency["multiple_of"] == 4 and latency["device"] == SLOW.to_json()
    assert report.budget == {
        "latency": 0.7,
        "latency_batch": 2,
        "latency_tokens": 1,
        "latency_device": str(place / "slow.json"),
        "scope": "sites",
    }
    # counted again from what was written
    model, _ = corank.load(tmp_path / "small")
    before, after = (corank.timing.predict(m, SLOW, 2, 0, runtime="graph") for m in (place / "dense", model))
    again = [round(1e9 * step.only("linear").seconds) for step in (before, after)]
    assert again == pytest.approx([latency["dense"], latency["compressed"]], rel=1e-3)
    for row in report.sites:
        assert row["kind"] == "dense" or row["rank"] % 4 == 0 or row["rank"] == row["max_rank"]
    assert "memory only" not in predicted_speed(latency) and not report.warnings


def test_the_command_says_what_it_predicts(place, tmp_path, capsys):
    flags = ["--data", str(place / "text.txt"), "--samples", "8", "--length", "32", "--no-eval", "--quiet"]
    timed = ["--latency-tokens", "64", "--latency-device", str(place / "slow.json")]
    command = ["compress", str(place / "dense"), "--method", "svd-llm", *flags]
    assert main([*command, "--budget-latency", "60%", *timed, "--out", str(tmp_path / "fast")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Predicted speed" in said and "prefill of 64 tokens, batch 1, slow" in said
    assert (
        main(["compress", "--recipe", str(tmp_path / "fast" / "recipe.yaml"), *flags, "--out", str(tmp_path / "2")])
        == 0
    )
    first, second = (corank.Report.load(tmp_path / d).accounting["latency"] for d in ("fast", "2"))
    assert first == second and first["compressed"] <= 0.6 * first["dense"]
    capsys.readouterr()
    assert (
        main(
            [
                *command,
                "--budget-latency",
                "0.99",
                "--set",
                "allocate=lagrange",
                *timed,
                "--out",
                str(tmp_path / "barely"),
            ]
        )
        == 0
    )
    assert "memory only" in (said := " ".join(capsys.readouterr().out.split())) and "Memory only" in said
    assert main([*command, "--keep", "0.5", "--latency-batch", "2", "--out", str(tmp_path / "x")]) == 2
    assert "--latency-batch belongs to --budget-latency" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latency": 1.5}, "outside"),
        ({"latency": 0.7, "keep": 0.5}, "exactly one"),
        ({"latency": 0.7, "scope": "model"}, "scope"),
        ({"latency": 0.7, "latency_batch": 0}, "at least 1"),
        ({"latency": 0.7, "share": "siblings"}, "share=none"),
        ({"latency": 0.7, "allocate": "ara"}, "learns sizes"),
        ({"latency": 0.7, "method": "curing"}, "rank rule of its own"),
        ({"latency": 0.7, "latency_device": "h300"}, "h200"),
        ({"latency": 0.01, "latency_device": "h200"}, "too small to be faster"),
    ],
)
def test_bad_input_says_what_to_do(place, tmp_path, arguments, message):
    arguments = {"method": "svd-llm", "data": place / "text.txt", "samples": 4, "length": 32, **arguments}
    with pytest.raises(CorankError, match=message):
        corank.compress(place / "dense", out=tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()
