"""From curves and a budget to a plan: the one place where ranks are chosen."""

from __future__ import annotations

from corank.budget.allocators import ALLOCATORS, MEASURED, Allocator, allocator, lagrange, uniform
from corank.budget.budget import Budget
from corank.budget.curve import CountFn, Curve, count_break_even
from corank.budget.plan import Choice, Plan, make_plan

__all__ = [
    "ALLOCATORS",
    "MEASURED",
    "Allocator",
    "Budget",
    "Choice",
    "CountFn",
    "Curve",
    "Plan",
    "allocator",
    "count_break_even",
    "lagrange",
    "make_plan",
    "uniform",
]
