"""Text to heal with must not be text to test with: what was learned by heart says nothing about a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from corank.errors import CorankError
from corank.model import Text

SPAN = 200
"""Characters that count as the same passage, whatever the white space between words."""
SHARE = 0.01
"""Part of a test text that may occur in the healing text: phrases that every text has, such as licences."""

TESTS = ("builtin-test", "builtin-code")
"""What reports measure on where nothing else is asked for."""


def overlap(text: str, test: str, span: int = SPAN) -> float:
    """Share of a test text whose passages occur in a text, by hashes of its windows.

    Every passage of two spans is found, and shorter ones of a span by chance. A text shorter than a span is one passage.

    Args:
        text: to heal with.
        test: to test with.
        span: characters of a window.
    """
    text, test = _plain(text), _plain(test)
    span = max(min(span, len(test), len(text)), 1)
    small, large = sorted((text, test), key=len)  # every window of one text is kept
    windows = {hash(small[i : i + span]) for i in range(len(small) - span + 1)}
    found = sum(hash(large[i : i + span]) in windows for i in range(0, len(large) - span + 1, span))
    return min(found * span / max(len(test), 1), 1.0)


def separate(text: Text, tests: Sequence[Text]) -> Text:
    """The text to heal with, if it is not the text to test with.

    Args:
        text: to heal with; of a mixture every part is looked at.
        tests: to test with.

    Raises:
        CorankError: more than `SHARE` of a test text occurs in it.
    """
    parts = [separate(part, tests) for part in text.parts]
    if parts:
        return Text.mixture(parts)
    for test in tests:
        for part in test.parts or (test,):
            share = overlap(text.text, part.text)
            if share > SHARE:
                raise CorankError(
                    f"{100 * share:.0f}% of the text to test with ({part.source}) occurs in the text to heal with "
                    f"({text.source}), so that the test would say nothing; heal with another text (--data), or test with one "
                    "(--text)."
                )
    return text


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
