"""Single matrices and their two factors, at ranks as they come and aligned, and with the second factor stored by columns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.allowance import Allowance
from benchmarks.rounds import ratio, rounds, spread
from corank.runtime.layout import turn
from corank.timing import Device, matrix_seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LINEARS = ((2048, 2048), (8192, 2048))
TOKENS = (1, 16, 128)
KEEPS = (0.8, 0.5)
MANY = 64
STEP = 32
COPIES_BYTES = 1 << 27
BY_COLUMNS = "second factor by columns"


def linears(
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    tokens: Sequence[int],
    repeats: int,
    device: Callable[[Any], Device],
    allowance: Allowance,
) -> list[dict[str, Any]]:
    """Single matrices: dense, and two factors at every keep, with ranks as they come and aligned."""
    rows = []
    cells = len(shapes) * len(dtypes) * len(tokens)
    for name in dtypes:
        where = device(DTYPES[name])
        for m, n in shapes:
            ranks: dict[str, int | None] = {"dense": None}
            for keep in KEEPS:
                rank = int(keep * m * n / (m + n))
                ranks[f"keep {keep}, rank {rank}"] = rank
                if rank % STEP:
                    ranks[f"keep {keep}, rank {rank // STEP * STEP}"] = rank // STEP * STEP
            weights = {label: _copies(m, n, rank, DTYPES[name]) for label, rank in ranks.items()}
            if DTYPES[name] == torch.float32:  # as the runtimes `packed` and `auto` store them
                for label, rank in [(f"keep {KEEPS[-1]}, {BY_COLUMNS}", int(KEEPS[-1] * m * n / (m + n)))]:
                    ranks[label], weights[label] = rank, _copies(m, n, rank, DTYPES[name])
                    for _, up in weights[label]:
                        turn(up)
            for count in tokens:
                x = torch.randn(count, n).to(DTYPES[name])
                # many tokens are bound by arithmetic, and two copies are enough
                used = {label: copies[: 2 if count >= MANY else None] for label, copies in weights.items()}
                runs = {label: _pass(x, copies) for label, copies in used.items()}
                clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
                with torch.no_grad():
                    seconds = rounds(runs, repeats, clock=clock, allowance=allowance.part(1 / cells))
                cells -= 1
                for label, rank in ranks.items():
                    each = [s / len(used[label]) for s in seconds[label]]
                    dense = [s / len(used["dense"]) for s in seconds["dense"]]
                    expected = matrix_seconds((m, n), rank, where, count)
                    rows.append(
                        {
                            "shape": [m, n],
                            "dtype": name,
                            "tokens": count,
                            "variant": label,
                            "rank": rank,
                            "kept": 1.0 if rank is None else rank * (m + n) / (m * n),
                            "aligned": rank is None or rank % STEP == 0,
                            "seconds": spread(each),
                            "rounds": len(each),
                            "speedup": ratio(dense, each),
                            "predicted_seconds": expected,
                            "predicted_speedup": matrix_seconds((m, n), None, where, count) / expected,
                        }
                    )
    return rows


def _copies(m: int, n: int, rank: int | None, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Enough copies of the matrices that no cache holds all of them; the same number at every rank."""
    count = min(max(2, COPIES_BYTES // (m * n * dtype.itemsize)), 64)
    sizes = [(m, n)] if rank is None else [(rank, n), (m, rank)]
    return [tuple((torch.randn(size) / 64).to(dtype) for size in sizes) for _ in range(count)]


def _pass(x: torch.Tensor, copies: Sequence[tuple[torch.Tensor, ...]]) -> Callable[[], None]:
    def run() -> None:
        for weights in copies:
            y = x
            for W in weights:
                y = F.linear(y, W)

    return run
