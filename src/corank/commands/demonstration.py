"""`corank demo`."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path

import torch

import corank
from corank.commands.output import console
from corank.report import numbers


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
