"""What is to be run of a page of the docs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


def commands(page: str) -> list[str]:
    """Lines of shell blocks that call corank, without comments."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("corank ")]
