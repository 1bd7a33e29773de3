"""The one exception meant for people: its message is a sentence that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CorankError(ValueError):
    """Bad input. The command line prints the sentence and exits with code 2; nothing has been written."""


def unknown(what: str, name: str, known: Iterable[str]) -> CorankError:
    """Build the error for an unknown name.

    Args:
        what: the category, e.g. ``"method"``.
        name: what was asked for.
        known: the names that exist; the nearest are suggested.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(names)}"
    return CorankError(f"Unknown {what} {name!r}; {hint}.")
