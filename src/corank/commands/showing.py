"""`corank inspect`, `corank methods` and `corank plot`."""

from __future__ import annotations

import fnmatch
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.table import Table

from corank import recipe
from corank.adaptation import adapters
from corank.commands.arguments import parse_settings
from corank.commands.output import console, emit
from corank.errors import CorankError
from corank.model import resolve
from corank.registry import Method
from corank.report import Report, numbers
from corank.watch import Watch


def inspect(args: Namespace) -> int:
    """``corank inspect``."""
    from corank.inspection import describe, plan_for, spectra

    path = resolve(args.model)
    found = describe(path)
    shown: dict[str, Any] = {"model": str(args.model), **found}
    watch = Watch("inspect", found["layers"], args.quiet)
    if args.spectra:
        shown["spectra"] = spectra(path, watch)
    if args.method:
        shown["plan"] = plan_for(
            path,
            args.method,
            {k: getattr(args, k) for k in ("keep", "remove", "params", "bytes")},
            args.scope,
            parse_settings(args.set, args),
            data=args.data or "builtin",
            samples=args.samples or 64,
            length=args.length or 512,
            seed=args.seed or 0,
            batch=args.batch,
            device=args.device,
            dtype=args.dtype,
            watch=watch,
        )
    watch.close()
    if args.json:
        emit(shown)
    else:
        _print_inspection(shown)
    return 0


def _print_inspection(shown: dict[str, Any]) -> None:
    out = console()
    table = Table(
        title=f"{shown['model']}: {shown['architecture']}, {shown['layers']} layers, "
        f"{numbers.count(shown['parameters'])} parameters",
        title_justify="left",
    )
    for head in ("Role", "Sites", "Shape", "Reads the input of", "Bias", "Parameters", "Share", "Kind"):
        table.add_column(head, justify="right" if head in ("Sites", "Parameters", "Share") else "left")
    for row in shown["roles"]:
        table.add_row(
            row["role"],
            str(row["sites"]),
            row["shape"],
            row["group"],
            "yes" if row["bias"] else "no",
            numbers.count(row["params"]),
            numbers.percent(row["params"] / shown["parameters"]),
            row["kind"],
        )
    out.print(table)
    if "spectra" in shown:
        table = Table(
            title="Spectra of the weights: share of the full rank that holds this share of the energy",
            title_justify="left",
        )
        for head in ("Role", "50%", "80%", "90%", "95%", "99%"):
            table.add_column(head, justify="left" if head == "Role" else "right")
        for row in shown["spectra"]:
            table.add_row(row["role"], *(numbers.percent(row[key]) for key in ("0.5", "0.8", "0.9", "0.95", "0.99")))
        out.print(table)
    if "plan" in shown:
        plan = shown["plan"]
        table = Table(
            title=f"The plan: {plan['cost']:,} of {plan['dense']:,} parameters over the sites "
            f"({plan['cost'] / plan['dense']:.1%}), by {plan['allocator']}",
            title_justify="left",
        )
        for head in (
            "Role",
            "Sites",
            "Stay dense",
            "Widths" if "structure" in plan else "Ranks",
            "Parameters kept",
            "Predicted relative loss",
        ):
            table.add_column(head, justify="left" if head == "Role" else "right")
        for row in plan["roles"]:
            loss = "–" if row["loss"] is None else numbers.number(row["loss"], 3)
            table.add_row(
                row["role"], str(row["sites"]), str(row["dense"]), row["ranks"], numbers.percent(row["kept"]), loss
            )
        out.print(table)
        if structure := plan.get("structure"):
            gone = ", ".join(map(str, structure["removed"])) or "none"
            print(f"Blocks that go{' into others' if structure['mixes'] else ''}: {gone}.")
        print("Nothing has been written.")


def methods(args: Namespace) -> int:
    """``corank methods``."""
    found = recipe.methods(args.pattern)
    found += [m for m in adapters().values() if fnmatch.fnmatch(m.name, args.pattern)]
    if not found:
        raise (
            CorankError(f"No method matches {args.pattern!r}; `corank methods` lists them.")
            if any(c in args.pattern for c in "*?[")
            else _unknown_method(args.pattern)
        )
    if args.json:
        emit(
            [
                {"name": m.name, "family": m.family, "cite": m.cite, "summary": m.summary, "parameters": m.parameters}
                for m in found
            ]
        )
    elif {m.name for m in found} == {args.pattern}:  # an adapter may have the name of a method of compression
        for method in found:
            _print_method(method)
    else:
        table = Table()
        for head in ("Method", "Family", "Source", "What it does", "Parameters"):
            table.add_column(head, overflow="fold")
        for m in found:
            table.add_row(m.name, m.family, m.cite, m.summary, ", ".join(f"{k}={v}" for k, v in m.parameters.items()))
        console().print(table)
    return 0


def _print_method(method: Method) -> None:
    adapts = method.family == "adapters"
    how = "as keywords of corank.adapters.attach" if adapts else "with --set NAME=VALUE"
    print(f"{method.name}  ({method.family}, {method.cite})\n\n{method.doc}\n\nParameters, {how}:")
    for name, value in method.parameters.items():
        print(f"  {name}={value}")
    if not adapts:
        print(f"Shared by all methods of the family {method.family}:")
    for name, value in method.common.items():
        print(f"  {name}={value}")


def _unknown_method(name: str) -> CorankError:
    try:
        recipe.get(name)
    except CorankError as error:
        return error
    raise AssertionError("a method that is known was not listed")


def plot(args: Namespace) -> int:
    """``corank plot``."""
    from corank.report import plots

    files = [f for p in map(Path, args.reports) for f in _report_files(p)]
    reports = [Report.load(f) for f in files]
    made: list[str] = []
    for file, report in zip(files, reports, strict=True):
        folder = Path(args.out) if args.out else file.parent
        prefix = f"{file.parent.name}-" if args.out and len(files) > 1 else ""
        for name, figure in plots.figures(report).items():
            made.append(str(plots.save(figure, folder / f"{prefix}{name}.{args.format}")))
    if len(reports) > 1:
        folder = Path(args.out) if args.out else Path(args.reports[0])
        made.append(str(plots.save(plots.pareto(reports), folder / f"pareto.{args.format}")))
    emit(made) if args.json else print("\n".join(made))
    return 0


def _report_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "report.json").is_file():
        return [path / "report.json"]
    found = sorted(path.glob("*/report.json"))
    if not found:
        raise CorankError(f"{path} holds no report.json, nor does a directory in it.")
    return found
