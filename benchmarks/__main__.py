"""``python -m benchmarks NAME ...``: run a benchmark; without a name, list them."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks

PARTS = (
    "__main__",
    "allowance",
    "cells",
    "chunked",
    "hardware",
    "linears",
    "rounds",
    "runner",
    "shapes",
    "speed_report",
    "stopwatch",
)
"""Modules that benchmarks are made of."""


def main() -> int:
    """Run the benchmark named first; the others are its arguments."""
    found = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in PARTS]
    modules = {name.replace("_", "-"): name for name in found}
    names = list(modules)
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print("usage: ./dev bench NAME [options]    (NAME --help says more)")
        for name in names:
            doc = importlib.import_module(f"benchmarks.{modules[name]}").__doc__ or ""
            print(f"  {name:14s} {doc.splitlines()[0]}")
        return 0 if len(sys.argv) < 2 else 2
    importlib.import_module(f"benchmarks.{modules[sys.argv[1]]}").main(sys.argv[2:])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
