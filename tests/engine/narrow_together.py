"""A run for several processes at once; in a module of its own, because they import it."""

from __future__ import annotations

import corank
from corank.model import Text
from tiny import text

DATA = dict(data=Text(text(), "words"), samples=8, length=32, batch=2, dtype="float64")


def compress_both(rank: int, folder: str, tag: str) -> None:
    """Into a directory of its own."""
    corank.compress(f"{folder}/dense", "best", keep=0.6, families="both", out=f"{folder}/{tag}", **DATA)
