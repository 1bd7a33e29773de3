"""What each command does. Results go to standard output, progress to standard error."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import corank
from corank import checkpoint, recipe
from corank.api import check_target, load
from corank.api import compress as compress_model
from corank.assess import assess, perplexities, write_documents
from corank.comparison import compare_methods
from corank.errors import CorankError
from corank.evaluate import sample, speed
from corank.jsonfile import encode
from corank.model import Text, read_text, resolve
from corank.report import Report, numbers
from corank.report.table import comparison_table, print_report, speed_table
from corank.watch import Watch

DEFAULT_TEXTS = ("builtin-test", "builtin-code")


def console(wide: bool = False) -> Console:
    """Standard output; 110 columns wide where there is no terminal to ask."""
    found = Console()
    return found if found.is_terminal else Console(width=110)


def emit(value: Any) -> None:
    """Print JSON."""
    print(json.dumps(encode(value), indent=2))


def layers_of(model: str) -> int:
    """Number of blocks of a model, for progress bars."""
    config = json.loads((resolve(model) / "config.json").read_text())
    return int(config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers") or 1)


def parse_settings(pairs: Sequence[str], args: Namespace | None = None) -> dict[str, Any]:
    """``["alpha=0.3"]`` -> ``{"alpha": "0.3"}``; --targets and --ignore are settings too.

    Raises:
        CorankError: a pair has no ``=``.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise CorankError(f"--set takes NAME=VALUE; {pair!r} is not of that form.")
        settings[name.strip().replace("-", "_")] = value.strip()
    for name in ("targets", "ignore"):
        if args is not None and getattr(args, name, None):
            settings[name] = tuple(getattr(args, name).split(","))
    return settings


def read_texts(names: Sequence[str] | None) -> list[Text]:
    """The texts to evaluate on."""
    return [read_text(name) for name in (names or DEFAULT_TEXTS)]


def compress(args: Namespace) -> int:
    """``corank compress``."""
    file = recipe.from_yaml(args.recipe) if args.recipe else {}
    run: dict[str, Any] = {
        "method": "svd-llm",
        "data": "builtin",
        "samples": 64,
        "length": 512,
        "seed": 0,
        "scope": None,
    }
    run |= {k: v for k, v in file.items() if k != "set"}
    flags = {k: getattr(args, k) for k in ("model", "method", "data", "samples", "length", "seed", "scope")}
    run |= {k: v for k, v in flags.items() if v is not None}
    budget = {k: getattr(args, k) for k in ("keep", "remove", "params", "bytes") if getattr(args, k) is not None}
    budget = budget or {k: run[k] for k in ("keep", "remove", "params", "bytes") if k in run}
    settings = {**(file.get("set") or {}), **parse_settings(args.set, args)}
    if not run.get("model"):
        raise CorankError("Name the model to compress: corank compress MODEL --keep 0.8 --out DIR.")
    entry = recipe.get(run["method"])
    entry.recipe(**settings)  # bad settings are told before anything is loaded
    out = check_target(args.out)
    texts = [] if args.no_eval else read_texts(args.text)
    watch = Watch(run["method"], layers_of(run["model"]), args.quiet)
    try:
        report = compress_model(
            run["model"],
            run["method"],
            **budget,
            scope=run["scope"],
            out=out,
            data=run["data"],
            samples=run["samples"],
            length=run["length"],
            seed=run["seed"],
            batch=args.batch,
            device=args.device,
            dtype=args.dtype,
            cache=args.cache,
            progress=watch,
            **settings,
        )
        if texts:
            report = assess(
                report,
                run["model"],
                out,
                texts,
                windows=args.windows or None,
                window=args.window,
                timed=args.speed,
                step=watch.step,
            )
    finally:
        watch.close()
    write_documents(report, out)
    (out / "recipe.yaml").write_text(recipe.to_yaml({**run, **budget, "set": settings}))
    if args.json:
        emit(report.to_json())
    else:
        print_report(report, console())
        print(f"\n{out} is ready: import corank, then AutoModelForCausalLM.from_pretrained({str(out)!r}).")
        print(f"The page with the plots: {out / 'report.html'}")
    return 0


def eval(args: Namespace) -> int:
    """``corank eval``."""
    texts = read_texts(args.text)
    model, tokenizer = load(args.model)
    watch = Watch("eval", 1, args.quiet)
    found = perplexities(model, tokenizer, texts, args.windows or None, args.window, str(args.model), watch.step)
    watch.close()
    if args.json:
        emit({"model": str(args.model), "perplexity": found})
        return 0
    table = Table(title=str(args.model), title_justify="left")
    for head in ("Text", "Perplexity", "Windows", "Tokens", "BOS", "Seconds"):
        table.add_column(head, justify="left" if head == "Text" else "right")
    for name, row in found.items():
        spread = row["value"] * row["stderr"]
        value = f"{numbers.number(row['value'])} ± {numbers.number(spread, 2)}"
        table.add_row(
            name,
            value,
            f"{row['windows']} × {row['window']}",
            str(row["tokens"]),
            "yes" if row["bos"] else "no",
            f"{row['seconds']:.1f}",
        )
    console().print(table)
    return 0


def compare(args: Namespace) -> int:
    """``corank compare``."""
    names = [n for n in args.methods.split(",") if n]
    settings = parse_settings(args.set)
    watch = Watch("compare", layers_of(args.model), args.quiet)
    try:
        reports, failed = compare_methods(
            args.model,
            names,
            args.keep,
            Path(args.out),
            texts=read_texts(args.text),
            windows=args.windows or None,
            window=args.window,
            settings=settings,
            data=args.data or "builtin",
            samples=args.samples or 64,
            length=args.length or 512,
            seed=args.seed or 0,
            batch=args.batch,
            device=args.device,
            dtype=args.dtype,
            save_models=args.save_models,
            watch=watch,
        )
    finally:
        watch.close()
    if args.json:
        emit({"reports": [r.to_json() for r in reports], "failed": failed})
    else:
        if reports:
            console().print(comparison_table(reports))
        for cell, reason in failed.items():
            print(f"{cell}: {reason}")
        print(
            f"The table with plots: {Path(args.out) / 'comparison.html'}; the Pareto front: {Path(args.out) / 'pareto.png'}"
        )
    return 0 if reports else 2


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
        for head in ("Role", "Sites", "Stay dense", "Ranks", "Parameters kept", "Predicted relative loss"):
            table.add_column(head, justify="left" if head == "Role" else "right")
        for row in plan["roles"]:
            loss = "–" if row["loss"] is None else numbers.number(row["loss"], 3)
            table.add_row(
                row["role"], str(row["sites"]), str(row["dense"]), row["ranks"], numbers.percent(row["kept"]), loss
            )
        out.print(table)
        print("Nothing has been written.")


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


def generate(args: Namespace) -> int:
    """``corank generate``."""
    model, tokenizer = load(args.model)
    result = sample(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.tokens,
        seed=args.seed,
        temperature=args.temperature,
        chat=args.chat,
    )
    emit(result.to_json()) if args.json else print(result.completion if args.chat else args.prompt + result.completion)
    return 0


def bench(args: Namespace) -> int:
    """``corank bench``."""
    try:
        batches = [int(b) for b in args.batch.split(",")]
    except ValueError:
        raise CorankError(f"--batch takes numbers separated by commas, not {args.batch!r}.") from None
    models = {"dense": load(args.baseline)[0]} | {Path(m).name: load(m)[0] for m in args.models}
    rows = speed(
        models, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens, batch_sizes=batches, repeats=args.repeats
    )
    found = [row.to_json() for row in rows]
    if args.json:
        emit(found)
    else:
        console().print(speed_table(found))
    return 0


def methods(args: Namespace) -> int:
    """``corank methods``."""
    found = recipe.methods(args.pattern)
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
    elif len(found) == 1 and args.pattern == found[0].name:
        method = found[0]
        print(f"{method.name}  ({method.family}, {method.cite})\n\n{method.doc}\n\nParameters, with --set NAME=VALUE:")
        for name, value in method.parameters.items():
            print(f"  {name}={value}")
        print("Shared by all methods:")
        for name, value in recipe.COMMON.items():
            print(f"  {name}={value}")
    else:
        table = Table()
        for head in ("Method", "Family", "Source", "What it does", "Parameters"):
            table.add_column(head, overflow="fold")
        for m in found:
            table.add_row(m.name, m.family, m.cite, m.summary, ", ".join(f"{k}={v}" for k, v in m.parameters.items()))
        console().print(table)
    return 0


def _unknown_method(name: str) -> CorankError:
    try:
        recipe.get(name)
    except CorankError as error:
        return error
    raise AssertionError("a method that is known was not listed")


def verify(args: Namespace) -> int:
    """``corank verify``."""
    checkpoint.verify(args.model)
    emit({"model": args.model, "verified": True}) if args.json else print(f"{args.model} is what was saved.")
    return 0


def dequantize(args: Namespace) -> int:
    """``corank dequantize``."""
    out = check_target(args.out)
    model, tokenizer = load(args.model)
    if getattr(model.config, "quantization_config", None) is None:
        raise CorankError(f"{args.model} is dense already.")
    checkpoint.save(checkpoint.dequantize(model), tokenizer, out)
    emit({"model": str(out)}) if args.json else print(f"{out} holds a plain dense model.")
    return 0


def demo(args: Namespace) -> int:
    """``corank demo``."""
    from corank.demo import run_demo

    start = time.perf_counter()
    run_demo(Path(args.out), str(args.keep), args.quiet, console())
    print(
        f"All of it took {numbers.duration(time.perf_counter() - start)} on {torch.get_num_threads()} threads, with corank "
        f"{corank.__version__}.",
        file=sys.stderr,
    )
    return 0
