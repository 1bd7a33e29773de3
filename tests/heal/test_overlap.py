"""Text to heal with is not text to test with."""

from __future__ import annotations

import pytest

from corank.errors import CorankError
from corank.heal.overlap import SPAN, TESTS, overlap, separate
from corank.model import Text, read_text
from tiny import text


def words(seed, characters=20_000):
    return text(characters, seed)


def test_the_same_text_is_found_however_it_is_wrapped():
    one = words(0)
    assert overlap(one, one) == pytest.approx(1, abs=0.02)
    assert overlap("\n".join(one.split(" ")), one) == overlap(one, one)
    assert overlap(words(1), one) == 0


def test_a_passage_is_found_wherever_it_stands():
    passage = words(2, 2 * SPAN + 10)
    for before in range(0, SPAN, 37):
        assert overlap(words(3)[:before] + passage + words(4), words(5) + passage[3:]) > 0
    assert overlap(passage, words(5, 400) + passage[: SPAN - 10]) == 0  # shorter than a window


def test_its_share_is_that_of_the_test_text():
    shared = words(6, 5000)
    assert overlap(words(7) + shared, shared + words(8, 5000)) == pytest.approx(0.5, abs=0.05)
    assert overlap(words(7, 3000) + shared, shared + words(8, 45_000)) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("source", ["", "short", " \n "])
def test_short_and_empty_texts_are_no_error(source):
    assert overlap(source, words(0)) == overlap(words(0), source) == 0 or source == "short"
    assert overlap("A SHORT TEXT", "A  SHORT\nTEXT") == 1


def test_overlapping_texts_are_refused_and_named():
    test = Text(words(0), "test.txt")
    mine = Text(words(1) + words(0)[4000:8000], "mine.txt")
    with pytest.raises(CorankError, match=r"20% .*test\.txt.*mine\.txt"):
        separate(mine, [test])
    with pytest.raises(CorankError, match=r"mine\.txt"):
        separate(Text.mixture([Text(words(1), "other.txt"), mine]), [test])
    assert separate(Text(words(1), "other.txt"), [test]).text == words(1)


def test_the_built_in_texts_can_be_used_together():
    source, tests = read_text("builtin"), [read_text(name) for name in TESTS]
    assert all(overlap(source.text, test.text) < 0.01 for test in tests)
    assert separate(source, tests) is source
    with pytest.raises(CorankError, match="builtin-test"):
        separate(read_text("builtin-test"), tests)
