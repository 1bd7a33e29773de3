"""Contenders take turns, round by round, and each is compared with the first within the same round."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.allowance import Allowance, Clock


def rounds(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
    allowance: Allowance | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender in every round; each round begins with another one.

    Args:
        contenders: what is timed.
        repeats, warmup: rounds that count, and rounds before them.
        clock: seconds; `time.thread_time` counts only what this thread computes, whatever else the machine does.
        allowance: no round is begun that would not end in time, judging by the last one; but one that counts.
    """
    allowance = allowance or Allowance()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(warmup + repeats):
        before = allowance.left
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            started = clock()
            contenders[name]()
            if repeat >= warmup:
                seconds[name].append(clock() - started)
        left = allowance.left
        if repeat >= warmup and (not left or before - left > left):
            break
    return seconds


def ratio(first: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as fast the other one is: the median of paired ratios, and their extremes."""
    paired = [a / b for a, b in zip(first, other, strict=True)]
    return {"median": statistics.median(paired), "min": min(paired), "max": max(paired)}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def free_threads(asked: int) -> int:
    """As many threads as were asked for, but no more than there are cores without work.

    More threads than free cores wait for each other at every product, which is then several times slower.
    """
    free = int((os.cpu_count() or 1) - os.getloadavg()[0])
    return max(1, min(asked, free))
