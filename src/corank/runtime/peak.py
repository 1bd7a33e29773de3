"""The peak memory of what a call computes, beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_activation(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that live at once, at most, of what `call` allocates.

    On a CPU from the allocator's events, which the profiler sees one by one; on CUDA from the allocator's own count.

    Args:
        call: what to measure; run once.
        device: where it computes.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak
