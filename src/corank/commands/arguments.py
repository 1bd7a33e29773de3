"""From what was typed to what functions take."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from corank.errors import CorankError
from corank.model import Text, read_text, resolve

DEFAULT_TEXTS = ("builtin-test", "builtin-code")


def layers_of(model: str) -> int:
    """Number of blocks of a model, for progress bars."""
    config = json.loads((resolve(model) / "config.json").read_text())
    return int(config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers") or 1)


def parse_settings(pairs: Sequence[str], args: Namespace | None = None) -> dict[str, Any]:
    """``["alpha=0.3"]`` -> ``{"alpha": "0.3"}``; --targets, --ignore, --heal, --minutes and --effort are settings too.

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
    for name in ("heal", "minutes", "effort"):
        if args is not None and getattr(args, name, None):
            settings[name] = getattr(args, name)
    return settings


def read_texts(names: Sequence[str] | None) -> list[Text]:
    """The texts to evaluate on."""
    return [read_text(name) for name in (names or DEFAULT_TEXTS)]
