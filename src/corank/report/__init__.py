"""Reports: JSON first, then tables, plots, one HTML page and the model card made from it."""

from corank.report.card import model_card, write_card
from corank.report.html import render_html, write_html
from corank.report.progress import Bar
from corank.report.report import Report
from corank.report.table import comparison_table, print_report, role_table, speed_table, summary_table

__all__ = [
    "Bar",
    "Report",
    "comparison_table",
    "model_card",
    "print_report",
    "render_html",
    "role_table",
    "speed_table",
    "summary_table",
    "write_card",
    "write_html",
]
