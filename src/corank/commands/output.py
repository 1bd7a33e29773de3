"""Where results go: standard output, as text or as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from corank.jsonfile import encode


def console(wide: bool = False) -> Console:
    """Standard output; 110 columns wide where there is no terminal to ask."""
    found = Console()
    return found if found.is_terminal else Console(width=110)


def emit(value: Any) -> None:
    """Print JSON."""
    print(json.dumps(encode(value), indent=2))
