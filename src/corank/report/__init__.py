"""Reports: JSON first, then tables, plots, one HTML page and the model card made from it."""

from corank.report.report import Report

__all__ = ["Report"]
