"""`corank prune`."""

from __future__ import annotations

from argparse import Namespace

from corank.commands.output import emit
from corank.pruning import prune as prune_model
from corank.report import numbers


def prune(args: Namespace) -> int:
    """``corank prune``."""
    sizes = {name: getattr(args, name) for name in ("keep", "remove", "params", "bytes")}
    report = prune_model(args.model, out=args.out, scope=args.scope, uniform=args.uniform or None, **sizes)
    if args.json:
        emit(report.to_json())
        return 0
    sites, model = report.accounting["sites"], report.accounting["model"]
    print(
        f"{args.out}: {sites['compressed']:,} of {sites['dense']:,} parameters of the selected matrices "
        f"({numbers.percent(sites['compressed'] / sites['dense'])}), {numbers.count(model['compressed'])} in all, in "
        f"{sum(report.stages.values()):.1f} seconds."
    )
    print(f"Measure what it costs: corank eval {args.out}")
    return 0
