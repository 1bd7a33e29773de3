"""Runs for several processes at once; in a module of its own, because they import it."""

from __future__ import annotations

import corank
from corank.model import Text
from tiny import text

DATA = dict(data=Text(text(), "words"), samples=6, length=16, batch=2, dtype="float64")
RUNS = {
    "layers, refitted": dict(method="basis-sharing", keep=0.5, update=True),
    "auto": dict(method="svd-llm", keep=0.6, share="auto", allocate="lagrange"),
    "no data": dict(method="joint-rank-k", keep=0.6),
}


def compress_all(rank: int, folder: str, tag: str) -> None:
    """Every run, each into a directory of its own."""
    for name, settings in RUNS.items():
        corank.compress(f"{folder}/dense", out=f"{folder}/{name}-{tag}", **settings, **DATA)
