"""The smallest model that is good enough: compress to a perplexity instead of to a size.

Each trial compresses to some `keep` and measures the perplexity on text that calibration has not seen. Statistics and
decompositions are made once and reused, so that a trial costs a selection of ranks, the writing of a model, and its
evaluation. The logarithm of the perplexity grows about exponentially as parameters are taken away, which makes the
search short.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corank.api import check_target, compress, evaluate, load
from corank.errors import CorankError
from corank.jsonfile import read_json, write_json
from corank.model import Text, read_text
from corank.report import Report

FIRST = 0.85
RATE = 8.4
"""d ln(increase of the log perplexity) / d keep to begin with: that of `best` on SmolLM2-135M between 0.6 and 0.8."""
LOWEST, HIGHEST = 0.05, 0.995
TOLERANCE = 0.01
MOST = 9


@dataclass(frozen=True)
class Trial:
    """A budget that was tried, and ln(perplexity / perplexity of the dense model) on held-out text."""

    keep: float
    increase: float


def parse_increase(value: float | str) -> float:
    """0.05 from 0.05 or "5%".

    Raises:
        CorankError: it is not a positive number.
    """
    try:
        number = float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else float(value)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise CorankError(f"max_perplexity_increase={value!r} should be a positive share, such as 5% or 0.05.")
    return number


def search(
    trial: Callable[[float], float], limit: float, tolerance: float = TOLERANCE, most: int = MOST
) -> tuple[Trial | None, list[Trial]]:
    """The smallest keep whose increase is within a limit.

    Args:
        trial: keep -> increase; assumed to fall as keep grows.
        limit: on the increase, > 0.
        tolerance: of keep.
        most: number of trials.

    Returns:
        (the best trial within the limit or None, all trials in order).
    """
    tried: list[Trial] = []
    low, high = LOWEST, 1.0  # the dense model is within any limit
    keep = FIRST
    while len(tried) < most and high - low > tolerance:
        tried.append(Trial(keep, trial(keep)))
        if tried[-1].increase <= limit:
            high = keep
        else:
            low = keep
        # where the curve is no exponential, every third trial halves the bracket
        keep = (low + high) / 2 if len(tried) % 3 == 2 else _next(tried, limit, low, high)
        if any(abs(keep - t.keep) < tolerance / 4 for t in tried):
            break
    good = [t for t in tried if t.increase <= limit]
    return (min(good, key=lambda t: t.keep) if good else None), tried


def _next(tried: list[Trial], limit: float, low: float, high: float) -> float:
    """Where the curve through the trials meets the limit, kept inside the bracket."""
    floor = 1e-4
    points = sorted((t.keep, math.log(min(max(t.increase, floor), 1e3))) for t in tried)
    near = sorted(points, key=lambda p: abs(p[1] - math.log(limit)))[:2]
    slope = -RATE
    if len(near) == 2 and near[0][0] != near[1][0]:
        measured = (near[1][1] - near[0][1]) / (near[1][0] - near[0][0])
        slope = measured if measured < -1 else -RATE
    keep = near[0][0] + (math.log(limit) - near[0][1]) / slope
    margin = min(TOLERANCE / 2, (high - low) / 4)
    return min(max(keep, low + margin, LOWEST), high - margin, HIGHEST)


def compress_to_quality(
    model: str | Path,
    method: str,
    max_perplexity_increase: float | str,
    *,
    out: str | Path,
    heldout: str | Path | Text = "builtin-test",
    windows: int | None = 24,
    window: int = 512,
    cache: str | Path | None = None,
    told: Callable[[Trial], None] = lambda trial: None,
    **rest: Any,
) -> Report:
    """The smallest model whose perplexity on held-out text exceeds the dense model's by no more than a share.

    Args:
        model: as in `corank.compress`, but on disk.
        method: name of a registered method that takes a budget.
        max_perplexity_increase: 0.05 or "5%".
        out: directory to write.
        heldout: text to judge by, not the calibration text.
        windows: how many windows of it, None for all.
        window: tokens in a window.
        cache: for statistics; None: a temporary one.
        told: called after every trial.
        rest: as in `corank.compress`.

    Returns:
        the report of the chosen model; its evaluation holds the trials.

    Raises:
        CorankError: no tried size is good enough; the nearest one is named, and nothing is written.
    """
    limit = math.log1p(parse_increase(max_perplexity_increase))
    target = check_target(out)
    text = heldout if isinstance(heldout, Text) else read_text(heldout)
    work = target.with_name(target.name + ".search")
    reports: dict[float, Report] = {}
    dense = evaluate(*load(model), text, max_windows=windows, window=window)

    def trial(keep: float) -> float:
        folder = work / f"keep-{keep:.4f}"
        note = work / f"keep-{keep:.4f}.json"
        if not folder.is_dir():
            compress(model, method, keep=round(keep, 4), out=folder, cache=cache or work / "cache", **rest)
        if not note.is_file():
            found = evaluate(*load(folder), text, max_windows=windows, window=window)
            write_json(note, found.to_json())
        reports[keep] = Report.load(folder / "report.json")
        increase = float(read_json(note)["nll"]) - dense.nll
        told(Trial(keep, increase))
        return increase if math.isfinite(increase) else math.inf

    best, tried = search(trial, limit)
    if best is None:
        nearest = min(tried, key=lambda t: t.increase)
        shutil.rmtree(work, ignore_errors=True)
        raise CorankError(
            f"No size that was tried stays within {max_perplexity_increase} of the dense model's perplexity "
            f"({dense.value:.2f} on {text.source}); the nearest, keep={nearest.keep:.3f}, is {math.expm1(nearest.increase):.1%} above it. "
            "Allow more, or use a better method."
        )
    trials = [{"keep": t.keep, "increase": math.expm1(t.increase)} for t in tried]
    chosen = dataclasses.replace(
        reports[best.keep],
        budget={**reports[best.keep].budget, "max_perplexity_increase": str(max_perplexity_increase), "trials": trials},
    )
    folder = work / f"keep-{best.keep:.4f}"
    chosen.save(folder / "report.json")
    if target.is_dir():
        target.rmdir()
    os.replace(folder, target)
    shutil.rmtree(work, ignore_errors=True)
    return chosen
