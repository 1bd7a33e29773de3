"""Timing on a GPU: CUDA events around CUDA graphs, contenders in turns; on a CPU, for trying things out, the clock."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from corank.timing import Device, measure_device


class Bench:
    """Where and how to measure.

    Args:
        dry: on the CPU, at toy sizes.
        minutes: no new measurement starts after this.
    """

    def __init__(self, dry: bool, minutes: float) -> None:
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.end = time.perf_counter() + 60 * minutes
        self.rounds = 2 if dry else 30
        self.known: Device | None = None

    @property
    def late(self) -> bool:
        """Whether the time is used up."""
        return time.perf_counter() > self.end

    def figures(self) -> Device:
        """The device, measured once, never from a cache."""
        if self.known is None:
            self.known = measure_device(self.device, self.dtype, size=64 if self.dry else None)
        return self.known

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work as a CUDA graph; on the CPU as it is."""
        if self.dry:
            return work
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one run: between two CUDA events, or by the clock."""
        if self.dry:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def turns(
        self,
        contenders: dict[str, Callable[[], Any]],
        repeats: int | None = None,
        before: Callable[[], Any] = lambda: None,
    ) -> dict[str, dict[str, float]]:
        """Median, 10th and 90th percentile of contenders that take turns, five rounds of warm-up left out.

        Args:
            contenders: what is timed.
            repeats: rounds; None: the usual number.
            before: called before every run, and not timed.
        """
        names, spent = list(contenders), {name: [] for name in contenders}
        warm = 1 if self.dry else 5
        for i in range(warm + (repeats or self.rounds)):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                before()
                taken = self.seconds(contenders[name])
                if i >= warm:
                    spent[name].append(taken)
        return {name: quantiles(values) for name, values in spent.items()}

    def free(self) -> None:
        """Give memory back."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    at = [ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.1, 0.9)]
    return {"median": statistics.median(ordered), "p10": at[0], "p90": at[1]}
