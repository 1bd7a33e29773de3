"""What there is to see in a plot, in one sentence computed from the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from corank.report import numbers
from corank.report.report import Report
from corank.report.summary import mean_loss


def spectra_headline(needed: Mapping[str, float], found: int) -> str:
    """Which role needs the most and which the least of its rank. ``needed``: role -> mean rank fraction."""
    needed = {role: share for role, share in needed.items() if share == share}  # NaN: its curves end above 10%
    if not needed:
        return "Relative loss against rank; the curves end at the ranks chosen"
    easy, hard = min(needed, key=lambda r: needed[r]), max(needed, key=lambda r: needed[r])
    if easy == hard:
        text = f"{hard} needs {100 * needed[hard]:.0f}% of its rank for a loss of 10%"
    else:
        text = (
            f"For a loss of 10%, {hard} needs {100 * needed[hard]:.0f}% of its rank "
            f"and {easy} {100 * needed[easy]:.0f}%"
        )
    return text + (f" (the {len(needed)} largest of {found} roles)" if found > len(needed) else "")


def rank_map_headline(report: Report) -> str:
    """How many sites stay dense, and which role keeps the most and the least."""
    kept: dict[str, float] = {}
    for role in report.roles:
        mine = [s for s in report.sites if str(s["role"]) == role]
        before = sum(s["params_dense"] for s in mine)
        kept[role] = sum(s["params"] for s in mine) / before if before else 1.0
    least, most = min(kept, key=lambda r: kept[r]), max(kept, key=lambda r: kept[r])
    dense = sum(s["kind"] == "dense" for s in report.sites)
    text = f"{dense} of {len(report.sites)} sites stay dense" if dense else "No site stays dense"
    if least == most or kept[most] - kept[least] < 0.005:
        return f"{text}; every role keeps {100 * kept[most]:.0f}%"
    return f"{text}; {most} keeps {100 * kept[most]:.0f}% of its parameters, {least} {100 * kept[least]:.0f}%"


def loss_headline(sites: Sequence[Mapping[str, Any]]) -> str:
    """Where the largest relative loss of the factored sites is, and their mean."""
    worst = max(sites, key=lambda s: s["loss"])
    if worst["loss"] == 0:
        return "No site loses anything"
    mean = mean_loss(sites)
    where = f"{worst['role']} of layer {worst['layer']}"
    most, average = numbers.percent(worst["loss"], 0), numbers.percent(mean, 0)
    return f"{where} loses most, {most}; factored sites {average} on average"


def healing_headline(steps: Sequence[Mapping[str, Any]]) -> str:
    """What healing won back on held-out sequences. ``steps``: with how, before, after, seconds."""
    parts = []
    for step in steps:
        before, after, spent = step["before"], step["after"], numbers.duration(step["seconds"])
        if numbers.finite(before) and numbers.finite(after) and before > 0 and after < before:
            parts.append(f"{step['how']} takes {100 * (1 - after / before):.0f}% off the loss in {spent}")
        else:
            parts.append(f"{step['how']} finds nothing better in {spent}")
    return "Healing with " + ", then ".join(parts)


def pareto_headline(points: Sequence[tuple[str, float, float]], text: str) -> str:
    """Which method has the lowest perplexity, and where. ``points``: (method, kept, perplexity ratio)."""
    finite = [p for p in points if math.isfinite(p[2])]
    methods = dict.fromkeys(m for m, _, _ in points)
    if not finite:
        return "No method gives a finite perplexity"
    if len(methods) == 1:
        _, kept, grown = min(finite, key=lambda p: p[1])
        return f"Perplexity on {text} is {numbers.ratio(grown)} dense at {100 * kept:.0f}% of the parameters"
    # A method is compared with the others at the budgets (to the nearest per cent) that several share.
    budgets: dict[int, list[tuple[str, float, float]]] = {}
    for point in finite:
        budgets.setdefault(round(100 * point[1]), []).append(point)
    shared = {b: min(p, key=lambda q: q[2])[0] for b, p in budgets.items() if len({m for m, _, _ in p}) > 1}
    winners = list(dict.fromkeys(shared.values()))
    if len(winners) == 1 and len(shared) > 1:
        return f"{winners[0]} has the lowest perplexity on {text} at every budget"
    if shared:
        lowest = min(shared)
        return f"{shared[lowest]} has the lowest perplexity on {text} at {lowest}% of the parameters"
    method, kept, grown = min(finite, key=lambda p: p[2])
    return f"Lowest perplexity on {text}: {method}, {numbers.ratio(grown)} dense at {100 * kept:.0f}%"
