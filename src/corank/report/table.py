"""Tables for the terminal (rich)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from corank.report import summary
from corank.report.report import Report


def summary_table(report: Report) -> Group:
    """The four numbers and the perplexities, before and after; then break-even, time, memory and seed."""
    table = _table(f"{report.model} → {report.method}")
    for heading in ("", "Dense", "Compressed", "Ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for change in summary.accounting_changes(report):
        table.add_row(*(Text(cell) for cell in change))
    evaluation = summary.evaluation_changes(report)
    if evaluation:
        table.add_section()
        for change in evaluation:
            table.add_row(*(Text(cell) for cell in change))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in summary.facts(report):
        facts.add_row(label, Text(value))
    return Group(table, facts)


def role_table(report: Report) -> FittedTable:
    """By role: sites, ranks, parameters kept, relative loss. The last row is all sites together."""
    return FittedTable(summary.role_table(report), total=True)


def comparison_table(reports: Sequence[Report]) -> FittedTable:
    """One row per report, the dense model first."""
    return FittedTable(summary.comparison_table(reports))


def speed_table(rows: Sequence[Mapping[str, Any]]) -> FittedTable:
    """Rows of ``evaluate.speed`` (as dicts)."""
    return FittedTable(summary.speed_table(rows))


def prediction_table(rows: Sequence[Mapping[str, Any]]) -> FittedTable:
    """Rows of ``corank.timing.predict`` (as dicts, with ``speedup``)."""
    return FittedTable(summary.prediction_table(rows))


def print_report(report: Report, console: Console | None = None) -> None:
    """Print all there is to say about one report: summary, facts, roles, speed, warnings."""
    parts: list[Any] = [summary_table(report)]
    if report.sites:
        parts.append(role_table(report))
    if report.speed:
        parts.append(speed_table(report.speed))
    parts += [Text(f"Warning: {warning}", style="yellow") for warning in report.warnings]
    (console or Console()).print(Group(*parts))


class FittedTable:
    """A rich renderable that, on a narrow terminal, leaves out the least important columns and says so."""

    def __init__(self, content: summary.Table, *, total: bool = False) -> None:
        """Args: content: text of the table. total: the last row sums up the others."""
        self.content = content
        self.total = total

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        dropped: list[int] = []
        table = self._build(dropped)
        for column in self.content.droppable:
            if Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width:
                break
            dropped.append(column)
            table = self._build(dropped)
        if dropped:
            names = dict.fromkeys(self.content.head[i] for i in sorted(dropped))
            table.caption = Text(f"no room for: {', '.join(names)}", style="dim")
            table.caption_justify = "left"
        yield table

    def _build(self, dropped: Sequence[int]) -> Table:
        table = _table(self.content.title)
        shown = [i for i in range(len(self.content.head)) if i not in dropped]
        for i in shown:
            heading = Text(self.content.head[i].replace(" ", "\n", 1))
            table.add_column(heading, justify="right" if i >= self.content.numeric else "left")
        for row in self.content.rows:
            table.add_row(*(Text(row[i]) for i in shown))
        if self.total and len(self.content.rows) > 1:
            table.rows[-2].end_section = True
        return table


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
