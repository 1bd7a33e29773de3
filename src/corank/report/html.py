"""One report, or several side by side, as one HTML file that fetches nothing and can be mailed."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corank.errors import CorankError
from corank.jsonfile import encode, write_text
from corank.report import numbers, plots, summary
from corank.report.report import ACCOUNTS, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CAPTIONS = {
    "spectra": "Relative loss against rank, by role. Curves that fall early are cheap to factorize.",
    "rank_map": "Parameters kept by role and layer, in per cent.",
    "loss_by_layer": "Relative loss of each factored site, ‖L(W − W′)S‖ / ‖LWS‖.",
    "healing": "Loss on sequences held out from healing, against the minutes spent.",
    "pareto": "Perplexity against parameters kept. Lower and further left is better.",
}

_STYLE = """
:root { color-scheme: light dark; --back:#ffffff; --card:#f5f6f8; --text:#1c2024; --dim:#5b646e;
  --line:#d5d9de; --accent:#0072B2; --warn:#8a4b00; --warnback:#fff3e0; }
@media (prefers-color-scheme: dark) { :root { --back:#15191e; --card:#1e242b; --text:#e3e7eb; --dim:#9aa5b1;
  --line:#3a424b; --accent:#56B4E9; --warn:#ffcf8a; --warnback:#33260f; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--back); color:var(--text);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; }
main { max-width:1120px; margin:0 auto; padding:2rem 1.25rem 4rem; }
h1 { font-size:1.6rem; line-height:1.25; margin:0 0 .25rem; overflow-wrap:anywhere; }
h2 { font-size:1.15rem; margin:2.25rem 0 .75rem; }
.sub, figcaption, .note { color:var(--dim); }
.sub { margin:0 0 1.5rem; overflow-wrap:anywhere; }
.cards { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(210px,45%),1fr)); gap:.75rem;
  margin-bottom:.75rem; }
.card { background:var(--card); border-radius:10px; padding:.85rem 1rem; }
.card .label { color:var(--dim); font-size:.85rem; }
.card .big { font-size:1.7rem; font-weight:650; font-variant-numeric:tabular-nums; }
.card .change { font-size:.9rem; font-variant-numeric:tabular-nums; }
.wide { overflow-x:auto; }
table { border-collapse:collapse; font-size:.92rem; font-variant-numeric:tabular-nums; }
th, td { text-align:left; padding:.35rem .8rem .35rem 0; border-bottom:1px solid var(--line);
white-space:nowrap; } th { color:var(--dim); font-weight:600; vertical-align:bottom; }
td.n, th.n { text-align:right; padding:.35rem 0 .35rem 1rem; }
thead th { white-space:normal; }
td.fold { white-space:normal; overflow-wrap:anywhere; }
tr.total td { font-weight:600; border-bottom:0; }
.sortable th { cursor:pointer; }
.sortable th:hover, summary:hover { color:var(--accent); }
figure { margin:0 0 1.75rem; }
figure .wide img { display:block; width:100%; min-width:680px; height:auto; }
figcaption { font-size:.9rem; margin-top:.35rem; }
.warning { color:var(--warn); background:var(--warnback); border-radius:8px; padding:.5rem .9rem; margin:.5rem
0; } summary { cursor:pointer; font-weight:600; }
details { border-top:1px solid var(--line); padding:.75rem 0; }
pre { background:var(--card); border-radius:8px; padding:.8rem 1rem; font-size:.85rem; white-space:pre-wrap;
  overflow-wrap:anywhere; margin:.4rem 0 1rem; font-family:ui-monospace,"DejaVu Sans Mono",Menlo,monospace; }
@media print { main { max-width:none; padding:0; } details { break-inside:avoid; } }
"""

# Sorting is a convenience: without scripts the tables read the same.
_SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function (table) {
  table.querySelectorAll("th").forEach(function (th, column) {
    th.addEventListener("click", function () {
      var down = th.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      th.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
      var rows = Array.from(table.tBodies[0].rows);
      rows.sort(function (a, b) {
        var x = a.cells[column].textContent, y = b.cells[column].textContent;
        return down * x.localeCompare(y, "en", { numeric: true });
      });
      rows.forEach(function (row) { table.tBodies[0].appendChild(row); });
    });
  });
});
"""


def render_html(reports: Report | Sequence[Report]) -> str:
    """The page as text. Without matplotlib it has no plots and says so.

    Args:
        reports: one report, or several to be compared: a table and a Pareto front come first, then each
            report without its plots.

    Raises:
        CorankError: there is no report.
    """
    every = [reports] if isinstance(reports, Report) else list(reports)
    if not every:
        raise CorankError("There is no report to show; give one or more.")
    if len(every) == 1:
        report = every[0]
        title = f"{report.model} · {report.method}"
        body = f"<h1>{escape(report.model)}</h1>\n<p class='sub'>{_subtitle(report)}</p>\n" + _sections(report)
    else:
        title = "corank comparison"
        table = summary.comparison_table(every)
        body = f"<h1>{escape(table.title)}</h1>\n<p class='sub'>{len(every)} reports</p>\n"
        body += _table(table) + _pareto(every)
        for report in every:
            name = f"{summary.call(report.method, report.parameters)}, {summary.settings(report.budget)}"
            body += f"<details><summary>{escape(name)}</summary>\n{_sections(report, drawn=False)}</details>\n"
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def write_html(reports: Report | Sequence[Report], path: str | Path) -> Path:
    """Write :func:`render_html` to a file, atomically, and return its path."""
    return write_text(path, render_html(reports))


def _sections(report: Report, *, drawn: bool = True) -> str:
    parts = [f"<p class='warning'>{escape(str(warning))}</p>\n" for warning in report.warnings]
    # Drawn for each of many reports the plots would make a file of tens of megabytes.
    parts += [_cards(report), _evaluation(report), _facts(report), _figures(report) if drawn else ""]
    if report.sites:
        parts.append(f"<h2>By role</h2>\n{_table(summary.role_table(report), total=len(report.roles) > 1)}")
    if report.speed:
        parts.append(f"<h2>Speed</h2>\n{_table(summary.speed_table(report.speed))}")
    parts += [_generation(report), _sites(report), _provenance(report)]
    return "".join(parts)


def _subtitle(report: Report) -> str:
    text = f"compressed by {summary.call(report.method, report.parameters)}"
    budget = summary.settings(report.budget)
    return escape(text + (f" to {budget}" if budget else ""))


def _cards(report: Report) -> str:
    counted = zip(ACCOUNTS, summary.accounting_changes(report), strict=True)
    rows = [
        [_card(change) for account, change in counted if report.accounting.get(account)],
        [_card(change) for change in summary.evaluation_changes(report)],
    ]
    return "".join(f"<div class='cards'>\n{''.join(cards)}</div>\n" for cards in rows if cards)


def _card(change: summary.Change) -> str:
    moved = f"{change.before} → {change.after}"
    return (
        f"<div class='card'><div class='label'>{escape(change.label)}</div>"
        f"<div class='big'>{escape(change.ratio)}</div><div class='change'>{escape(moved)}</div></div>\n"
    )


def _evaluation(report: Report) -> str:
    """How each perplexity was measured, where the report says so."""
    rows = []
    for text in report.texts():
        entry = (report.evaluation.get("compressed") or {}).get(text)
        if isinstance(entry, Mapping):
            known = ("tokens", "windows", "window", "bos", "stderr")
            said = [f"{key} {_plain(entry[key])}" for key in known if entry.get(key) is not None]
            rows.append(f"{text}: {', '.join(said)}")
    return f"<p class='note'>Perplexity. {escape('; '.join(rows))}.</p>\n" if rows else ""


def _facts(report: Report) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(label)}</th><td class='fold'>{escape(value)}</td></tr>\n"
        for label, value in summary.facts(report)
    )
    return f"<h2>What was done</h2>\n<table>\n{rows}</table>\n"


def _figures(report: Report) -> str:
    try:
        light, dark = plots.figures(report), plots.figures(report, dark=True)
    except CorankError as error:
        return f"<p class='note'>{escape(str(error))}</p>\n"
    if not light:
        return ""
    drawn = "".join(_figure(name, light[name], dark[name]) for name in light)
    return f"<h2>Where the rank went</h2>\n{drawn}"


def _pareto(reports: Sequence[Report]) -> str:
    try:
        figure = _figure("pareto", plots.pareto(reports), plots.pareto(reports, dark=True))
    except CorankError as error:
        return f"<p class='note'>{escape(str(error))}</p>\n"
    return f"<h2>Loss against size</h2>\n{figure}"


def _figure(name: str, light: Figure, dark: Figure) -> str:
    headline = escape(light.get_suptitle(), quote=True)
    dark_first = f"<source media='(prefers-color-scheme: dark)' srcset='{_data(dark)}'>"
    return (
        f"<figure><div class='wide'><picture>{dark_first}"
        f"<img alt='{headline}' src='{_data(light)}'></picture></div>"
        f"<figcaption>{escape(_CAPTIONS[name])}</figcaption></figure>\n"
    )


def _data(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(plots.svg(figure).encode()).decode("ascii")


def _table(content: summary.Table, *, total: bool = False, sortable: bool = False) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        numeric = " class='n'" if index >= content.numeric else ""
        scope = " scope='col'" if tag == "th" else ""
        return f"<{tag}{numeric}{scope}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(content.head))
    lines = []
    for number, row in enumerate(content.rows):
        last = " class='total'" if total and number == len(content.rows) - 1 else ""
        lines.append(f"<tr{last}>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>\n")
    kind = " class='sortable'" if sortable else ""
    body = "".join(lines)
    head = f"<thead><tr>{head}</tr></thead>\n"
    return f"<div class='wide'><table{kind}>\n{head}<tbody>\n{body}</tbody>\n</table></div>\n"


def _generation(report: Report) -> str:
    shown = []
    for key, value in report.generation.items():
        if isinstance(value, Mapping):
            value = value.get("completion") or json.dumps(encode(value), ensure_ascii=False, indent=1)
        if isinstance(value, (list, tuple)):
            value = json.dumps(encode({key: value})[key], ensure_ascii=False, indent=1)
        shown.append(f"<div class='note'>{escape(str(key))}</div><pre>{escape(_plain(value))}</pre>\n")
    return f"<h2>Sample</h2>\n{''.join(shown)}" if shown else ""


def _sites(report: Report) -> str:
    if not report.sites:
        return ""
    table = _table(summary.site_table(report), sortable=True)
    return f"<h2>Details</h2>\n<details><summary>All {len(report.sites)} sites</summary>\n{table}</details>\n"


def _provenance(report: Report) -> str:
    facts = {
        "corank": report.corank,
        "parameters": dict(report.parameters),
        "budget": dict(report.budget),
        "seed": report.seed,
        "data": dict(report.data),
        "versions": dict(report.versions),
    }
    text = json.dumps(encode(facts), ensure_ascii=False, indent=2)
    return f"<details><summary>To do it again</summary>\n<pre>{escape(text)}</pre></details>\n"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return numbers.number(value, 3) if isinstance(value, float) else str(value)
