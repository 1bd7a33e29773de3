"""`corank compress` and `corank compare`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from corank import recipe
from corank.api import check_target
from corank.api import compress as compress_model
from corank.assess import assess, write_documents
from corank.commands.arguments import layers_of, parse_settings, read_texts
from corank.commands.output import console, emit
from corank.comparison import compare_methods
from corank.engine.world import launched, rank, started
from corank.errors import CorankError
from corank.heal.overlap import separate
from corank.model import read_text
from corank.report.table import comparison_table, print_report
from corank.watch import Watch


def compress(args: Namespace) -> int:
    """``corank compress``; under torchrun all processes work, and one speaks."""
    with launched(args.device) as speaks:
        try:
            return _compress(args)
        except CorankError:
            if speaks():
                raise
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            if speaks():
                raise
            raise SystemExit(130) from None


def _compress(args: Namespace) -> int:
    first = rank() == 0
    file = recipe.from_yaml(args.recipe) if args.recipe else {}
    run: dict[str, Any] = {
        "method": "best",
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
    if args.max_perplexity_increase is not None:
        budget |= {"max_perplexity_increase": args.max_perplexity_increase, "heldout": args.heldout}
    timed = {f"latency_{k}": getattr(args, f"latency_{k}") for k in ("batch", "tokens", "device")}
    if args.budget_latency is not None:
        budget |= {"latency": args.budget_latency}
    sizes = ("keep", "remove", "params", "bytes", "max_perplexity_increase", "heldout", "latency", *timed)
    budget = budget or {k: run[k] for k in sizes if k in run}
    asked = {k: value for k, value in timed.items() if value is not None}
    if asked and "latency" not in budget:
        raise CorankError(
            f"--{min(asked).replace('_', '-')} belongs to --budget-latency, which says how much of the time."
        )
    budget |= asked
    settings = {**(file.get("set") or {}), **parse_settings(args.set, args)}
    if not run.get("model"):
        raise CorankError("Name the model to compress: corank compress MODEL --keep 0.8 --out DIR.")
    entry = recipe.get(run["method"])
    chosen = entry.recipe(**settings)  # bad settings are told before anything is loaded
    out = check_target(args.out)
    texts = [] if args.no_eval else read_texts(args.text)
    data = run["data"]
    if chosen.heal != "none":  # it learns from the calibration text
        data = read_text(data)
        separate(data, [*texts, read_text(budget["heldout"])] if "heldout" in budget else texts)
    watch = Watch(run["method"], layers_of(run["model"]), args.quiet or not first)
    try:
        report = compress_model(
            run["model"],
            run["method"],
            **budget,
            scope=run["scope"],
            out=out,
            data=data,
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
        if not first:
            return 0
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
    # what was found for multiple_of=auto holds on any machine
    settings = {k: report.parameters.get(k, v) if v == "auto" else v for k, v in settings.items()}
    (out / "recipe.yaml").write_text(recipe.to_yaml({**run, **budget, "set": settings}))
    if args.json:
        emit(report.to_json())
    else:
        print_report(report, console())
        door = "" if report.ordinary else "import corank, then "
        print(f"\n{out} is ready: {door}AutoModelForCausalLM.from_pretrained({str(out)!r}).")
        print(f"The page with the plots: {out / 'report.html'}")
    return 0


def compare(args: Namespace) -> int:
    """``corank compare``."""
    if started() > 1:
        raise CorankError(
            "corank compare runs in one process; start it without torchrun, or share out corank compress."
        )
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
