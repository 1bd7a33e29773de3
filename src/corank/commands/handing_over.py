"""`corank verify`, `corank quantize`, `corank dequantize`, `corank export` and `corank serve`."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

from corank import checkpoint
from corank.api import check_target, load
from corank.checkpoint.verify import corank_config, read_config, weight_files
from corank.commands.output import emit
from corank.errors import CorankError
from corank.model import resolve
from corank.report import numbers
from corank.watch import Watch


def verify(args: Namespace) -> int:
    """``corank verify``."""
    path = resolve(args.model)
    checkpoint.verify(path)
    section, files = corank_config(read_config(path)), weight_files(path)
    if args.json:
        modules = 0 if section is None else len(section.modules)
        emit({"model": args.model, "verified": section is not None, "files": len(files), "factorized": modules})
    elif section is None:
        print(f"{args.model} is a dense model; its {_files(files)} readable, and there are no digests to check.")
    else:
        print(
            f"{args.model} is what was saved: {_files(files)} as their SHA-256 says, {len(section.modules)} factorized "
            "matrices have the shapes and norms that config.json says."
        )
    return 0


def _files(files: list[Path]) -> str:
    return f"{len(files)} weight file{'s are' if len(files) != 1 else ' is'}"


def quantize(args: Namespace) -> int:
    """``corank quantize``."""
    out = check_target(args.out)
    account = checkpoint.quantize_factors(resolve(args.model), args.scheme, out=out, group=args.group)
    if args.json:
        emit({"model": str(out), **dataclasses.asdict(account), "bits": account.bits})
        return 0
    stored = ", ".join(f"{many} as {name}" for name, many in account.matrices.items())
    print(
        f"{out}: the factors take {numbers.size(account.after)} instead of {numbers.size(account.before)}, "
        f"{account.bits:.2f} bits a value with the scales ({stored})."
    )
    print(f"Measure what the rounding costs: corank eval {out}")
    return 0


def dequantize(args: Namespace) -> int:
    """``corank dequantize``."""
    out = check_target(args.out)
    model, tokenizer = load(args.model)
    if getattr(model.config, "quantization_config", None) is None:
        raise CorankError(f"{args.model} is dense already.")
    checkpoint.save(checkpoint.dequantize(model), tokenizer, out)
    size = sum(file.stat().st_size for file in weight_files(out))
    if args.json:
        emit({"model": str(out), "bytes": size})
    else:
        print(f"{out} holds a plain dense model, {numbers.size(size)}; anything that loads the original loads it.")
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
        engine = "OpenVINO" if done.format == "openvino" else "ONNX Runtime"
        copied = f" and a second copy of tied matrices ({done.copied:,})" if done.copied else ""
        print(
            f"Numbers stored in the graph: {done.initializers:,}; after {engine}'s optimization "
            f"{done.optimized - (done.copied or 0):,}{copied}; multiplied out it would be {done.densified:,}."
        )
    return 0


def serve(args: Namespace) -> int:
    """``corank serve``."""
    from corank.serve.server import serve as serve_model

    return serve_model(args.model, host=args.host, port=args.port, engine=args.engine, name=args.name)
