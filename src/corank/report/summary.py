"""The rows of every table, as text: terminal, page and card say the same because they ask here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from corank.report import numbers
from corank.report.report import ACCOUNTS, Report
from corank.timing import PAYS

LABELS = {
    "sites": "Parameters over sites",
    "model": "Parameters of the model",
    "bytes": "Bytes on disk",
    "flops_per_token": "FLOPs per token",
}


class Change(NamedTuple):
    """A quantity before and after, and what is kept of it or how it grew."""

    label: str
    before: str
    after: str
    ratio: str


class Table(NamedTuple):
    """Headings and rows of text.

    Attributes:
        numeric: columns from this index on are right-aligned.
        droppable: columns to leave out, in this order, where there is no room for all.
    """

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numeric: int = 1
    droppable: tuple[int, ...] = ()


def accounting_changes(report: Report) -> list[Change]:
    """The four numbers: parameters over the sites and over the model, bytes on disk, FLOPs per token."""
    changes = []
    for account in ACCOUNTS:
        entry = report.accounting.get(account) or {}
        show = numbers.size if account == "bytes" else numbers.count
        before, after = show(entry.get("dense")), show(entry.get("compressed"))
        changes.append(Change(LABELS[account], before, after, _kept(report, account)))
    return changes


def evaluation_changes(report: Report) -> list[Change]:
    """Perplexity on each text (ratio to the dense model), then other measures (difference)."""
    changes = []
    for text in report.texts():
        dense, compressed = report.perplexity(text, "dense"), report.perplexity(text)
        grown = None if dense is None or compressed is None else compressed / dense if dense else math.nan
        changes.append(
            Change(
                f"Perplexity, {text}",
                numbers.number(dense),
                numbers.number(compressed),
                numbers.ratio(grown),
            )
        )
    before, after = (report.evaluation.get(which) or {} for which in ("dense", "compressed"))
    for name in dict.fromkeys([*before, *after]):
        dense, compressed = before.get(name), after.get(name)
        example = dense if isinstance(dense, Mapping) else compressed
        if isinstance(example, Mapping) and example.get("metric", "perplexity") != "perplexity":
            first, second = (x.get("value") if isinstance(x, Mapping) else None for x in (dense, compressed))
            difference = f"{second - first:+.4g}" if first is not None and second is not None else numbers.DASH
            label = f"{example['metric']}, {name}"
            changes.append(Change(label, numbers.number(first), numbers.number(second), difference))
    return changes


def facts(report: Report) -> list[tuple[str, str]]:
    """What has no before and after: method, budget, break-even, time, memory, seed."""
    rows = [
        ("Method", call(report.method, report.parameters)),
        ("Budget", settings(report.budget) or numbers.DASH),
    ]
    if report.sites:
        dense = sum(site["kind"] == "dense" for site in report.sites)
        rows.append(("Sites", f"{len(report.sites)} ({dense} left dense)"))
    nats = report.predicted_increase
    if nats is not None:
        predicted = f"+{numbers.number(nats, 3)} nats per token, perplexity {numbers.ratio(math.exp(min(nats, 700.0)))}"
        rows.append(("Predicted", f"{predicted}, on text like the calibration text"))
    if latency := report.accounting.get("latency"):
        rows.append(("Predicted speed", predicted_speed(latency)))
    broken = break_even(report)
    if broken:
        rows.append(("Break-even rank", broken))
    if report.stages:
        stages = ", ".join(f"{name} {numbers.duration(s)}" for name, s in report.stages.items())
        rows.append(("Time", f"{numbers.duration(report.seconds)} ({stages})"))
    if report.peak_memory_bytes is not None:
        rows.append(("Peak memory", numbers.size(report.peak_memory_bytes)))
    if report.seed is not None:
        rows.append(("Seed", str(report.seed)))
    return rows


def predicted_speed(latency: Mapping[str, Any]) -> str:
    """What a budget of time is predicted to come to: the speed-up of the matrices, or that there is none."""
    device = latency["device"]
    step = "decode" if latency["tokens"] == 1 else f"prefill of {latency['tokens']} tokens"
    where = f"{step}, batch {latency['batch']}, {device['name']}{', assumed figures' if device['assumed'] else ''}"
    grown = f"{numbers.ratio(latency['speedup'])} for the matrices ({where})"
    return grown if latency["speedup"] >= PAYS else f"memory only: {grown}"


def break_even(report: Report) -> str:
    """The rank below which a factored site is smaller than the dense one, as the accounting gives it."""
    entry = report.accounting.get("break_even")
    if entry is None:
        return ""
    if not isinstance(entry, Mapping):
        return str(entry)
    shown = [f"{k}: {numbers.number(v) if isinstance(v, float) else v}" for k, v in list(entry.items())[:12]]
    more = len(entry) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def role_table(report: Report) -> Table:
    """By role: sites, how many stay dense, ranks, parameters kept, relative loss."""
    rows = [_role_row(role, [s for s in report.sites if str(s["role"]) == role]) for role in report.roles]
    if len(rows) > 1:
        rows.append(_role_row("all", report.sites))
    head = ("Role", "Sites", "Dense", "Rank", "of", "Kept", "Loss, mean", "Loss, predicted", "Loss, worst")
    return Table("By role", head, rows, droppable=(7, 4))


def site_table(report: Report) -> Table:
    """Every site."""
    rows: list[tuple[str, ...]] = [
        (
            str(site["name"]),
            str(site["kind"]),
            "×".join(str(d) for d in site["shape"]),
            rank_text(site),
            str(site["max_rank"]),
            numbers.percent(site["params"] / site["params_dense"]) if site["params_dense"] else numbers.DASH,
            numbers.number(site["loss"], 3),
            numbers.number(site.get("predicted_loss"), 3),
        )
        for site in report.sites
    ]
    head = ("Site", "Kind", "Shape", "Rank", "of", "Kept", "Loss", "Predicted")
    return Table("All sites", head, rows, numeric=2)


def comparison_table(reports: Sequence[Report]) -> Table:
    """One row per report, the dense model first; columns that no report has are left out."""
    texts = list(dict.fromkeys(text for report in reports for text in report.texts()))
    models = list(dict.fromkeys(report.model for report in reports))
    head = ["Method", "Budget", "Sites kept", "Model kept", "Bytes kept", "FLOPs kept"]
    head += [*(f"PPL {text}" for text in texts), "Time", "Peak memory"]
    shared = _shared([report.budget for report in reports])
    body: list[list[str]] = []
    for model in models:
        group = [report for report in reports if report.model == model]
        row = ["dense" if len(models) == 1 else f"dense {model}", numbers.DASH] + ["100.0%"] * len(ACCOUNTS)
        for text in texts:
            known = [p for r in group if (p := r.perplexity(text, "dense")) is not None]
            row.append(f"{numbers.number(known[0])} (1.00×)" if known else numbers.DASH)
        body.append([*row, numbers.DASH, numbers.DASH])
        for report in group:
            budget = {key: value for key, value in report.budget.items() if key not in shared}
            row = [report.method, settings(budget) or settings(report.budget) or numbers.DASH]
            row += [_kept(report, account) for account in ACCOUNTS]
            for text in texts:
                ppl, grown = report.perplexity(text), report.perplexity_ratio(text)
                known_ratio = ppl is not None and report.perplexity(text, "dense")
                row.append(numbers.number(ppl) + (f" ({numbers.ratio(grown)})" if known_ratio else ""))
            row.append(numbers.duration(report.seconds) if report.stages else numbers.DASH)
            body.append([*row, numbers.size(report.peak_memory_bytes)])
    used = [i for i in range(len(head)) if i < 3 or any(row[i] not in (numbers.DASH, "100.0%") for row in body)]
    title = f"Comparison on {models[0]}" if len(models) == 1 else "Comparison"
    least = [
        "Time",
        "Peak memory",
        "FLOPs kept",
        "Bytes kept",
        "Model kept",
        *(f"PPL {t}" for t in texts[:0:-1]),
    ]
    drop = [head.index(name) for name in least]
    return Table(
        title,
        tuple(head[i] for i in used),
        [tuple(row[i] for i in used) for row in body],
        numeric=2,
        droppable=tuple(used.index(i) for i in drop if i in used),
    )


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of ``evaluate.speed`` (as dicts): rates, ratio to the first model with its range, bound."""
    body = []
    predicted = any(row.get("decode_predicted") is not None for row in rows)
    for row in rows:
        cells = [str(row.get("model", "")), str(row.get("batch", ""))]
        for kind in ("prefill", "decode"):
            rate, grown = row.get(f"{kind}_tokens_per_s"), numbers.ratio(row.get(f"{kind}_ratio"))
            low, high = row.get(f"{kind}_ratio_min"), row.get(f"{kind}_ratio_max")
            if low is not None and high is not None and low != high:
                grown += f" ({low:.2f}–{high:.2f})"
            cells += [numbers.number(rate, 3), grown, numbers.percent(row.get(f"{kind}_bound"), 0)]
            expected = row.get(f"{kind}_predicted")
            cells += (
                [] if not predicted else [numbers.number(expected, 3), numbers.percent(row.get(f"{kind}_floor"), 0)]
            )
        weights = numbers.size(row.get("weight_bytes"), 3)
        body.append((*cells, weights, numbers.count(row.get("decode_flops_per_token"), 3)))
    rates: tuple[str, ...] = ("Prefill tok/s", "ratio (range)", "of bound", "Decode tok/s", "ratio (range)", "of bound")
    if predicted:
        rates = (*rates[:3], "predicted tok/s", "of floor", *rates[3:], "predicted tok/s", "of floor")
    head = ("Model", "Batch", *rates, "Weights read", "FLOPs per token")
    return Table("Speed", head, body, droppable=(13, 12, 4, 9) if predicted else (9, 8, 4, 7))


def prediction_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of the time model: the time of a step, how much faster than dense, and what part of it is not launches."""
    body: list[tuple[str, ...]] = [
        (
            str(row["model"]),
            f"{row['mode']}, {row['context']}",
            str(row["batch"]),
            str(row["runtime"]),
            f"{1e3 * row['seconds']:.3g}",
            numbers.ratio(row["speedup"]) if row["speedup"] is not None else numbers.DASH,
            f"{1e3 * row['floor_seconds']:.3g}",
            numbers.percent(row["fraction_of_floor"], 0),
            f"{row['launches']:.0f}",
            numbers.size(row["bytes"], 3),
        )
        for row in rows
    ]
    device = rows[0]["device"]
    known = f"{device['name']}, {device['dtype']}" + (", assumed figures" if device["assumed"] else "")
    heads = ("Step, context", "Batch", "Runtime", "ms", "over dense", "floor ms", "of floor", "Launches", "Bytes moved")
    return Table(f"Predicted on {known}", ("Model", *heads), body, numeric=4, droppable=(9, 8, 6))


def rank_text(site: Mapping[str, Any]) -> str:
    """The rank of a site, or ``dense``."""
    return "dense" if site["kind"] == "dense" else str(site["rank"])


def settings(values: Mapping[str, Any]) -> str:
    """``{"keep": 0.8, "params": None}`` -> ``keep=0.8``."""
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None)


def call(method: str, parameters: Mapping[str, Any]) -> str:
    """``asvd(alpha=0.5)``; the bare name without parameters."""
    inner = settings(parameters)
    return f"{method}({inner})" if inner else method


def mean_loss(sites: Sequence[Mapping[str, Any]], which: str = "loss") -> float | None:
    """Mean relative loss (``"loss"`` or ``"predicted_loss"``) over the sites that have one."""
    losses = [site[which] for site in sites if site.get(which) is not None]
    return statistics.fmean(losses) if losses else None


def _role_row(role: str, sites: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    dense = [s for s in sites if s["kind"] == "dense"]
    ranks = [int(s["rank"]) for s in sites if s["kind"] != "dense" and s["rank"] is not None]
    full = [int(s["max_rank"]) for s in sites]
    params, before = sum(s["params"] for s in sites), sum(s["params_dense"] for s in sites)
    losses = [s["loss"] for s in sites if s["loss"] is not None]
    return (
        role,
        str(len(sites)),
        str(len(dense)),
        _range(ranks) if ranks else "dense" if dense else numbers.DASH,
        _range(full) if full else numbers.DASH,
        numbers.percent(params / before) if before else numbers.DASH,
        numbers.number(mean_loss(sites), 3),
        numbers.number(mean_loss(sites, "predicted_loss"), 3),
        numbers.number(max(losses, default=None), 3),
    )


def _kept(report: Report, account: str) -> str:
    kept = report.kept(account)
    return numbers.DASH if math.isnan(kept) else numbers.percent(kept)


def _shared(mappings: Sequence[Mapping[str, Any]]) -> set[str]:
    """The keys with one and the same value in all mappings."""
    first = mappings[0] if len(mappings) > 1 else {}
    return {key for key, value in first.items() if all(key in m and m[key] == value for m in mappings)}


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"
