"""`corank verify`, `corank dequantize`, `corank export` and `corank serve`."""

from __future__ import annotations

from argparse import Namespace

from corank import checkpoint
from corank.api import check_target, load
from corank.commands.output import emit
from corank.errors import CorankError
from corank.report import numbers
from corank.watch import Watch


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


def export(args: Namespace) -> int:
    """``corank export``."""
    from corank.serve.export import export as export_model

    watch = Watch("export", 1, args.quiet)
    try:
        done = export_model(args.model, args.format, args.out, tolerance=args.tolerance, step=watch.step)
    finally:
        watch.close()
    if args.json:
        emit(done.to_json())
        return 0
    print(f"{done.path}: {numbers.size(sum(done.files.values()))}, {numbers.count(done.parameters)} parameters.")
    if done.difference is not None:
        print(f"Checked: no logit is off by more than {done.difference:.2g}, where they reach {done.magnitude:.3g}.")
    if done.initializers is not None and done.optimized is not None:
        copied = f" and a second copy of tied matrices ({done.copied:,})" if done.copied else ""
        print(
            f"Numbers stored in the graph: {done.initializers:,}; after ONNX Runtime's optimization "
            f"{done.optimized - (done.copied or 0):,}{copied}; multiplied out it would be {done.densified:,}."
        )
    return 0


def serve(args: Namespace) -> int:
    """``corank serve``."""
    from corank.serve.server import serve as serve_model

    return serve_model(args.model, host=args.host, port=args.port, engine=args.engine, name=args.name)
