"""Calibration windows: drawn from one text, or in equal shares from several."""

from __future__ import annotations

import pytest
import torch

from corank.errors import CorankError
from corank.model import Text, calibration, read_text
from tiny import text, tokenizer

A, B, C = (Text(text(seed=i), f"text {i}") for i in range(3))


def ids(source, samples, length=16):
    return calibration(tokenizer(), source, samples, length, 0).ids


def test_a_mixture_gives_equal_shares_of_its_texts():
    mixed = ids(Text.mixture([A, B, C]), 8)
    assert torch.equal(mixed, torch.cat([ids(A, 3), ids(B, 3), ids(C, 2)]))


def test_a_mixture_of_one_is_that_text():
    assert Text.mixture([A]) is A
    assert read_text([A, B]) == Text.mixture([A, B]) and read_text(A) is A


def test_a_mixture_is_not_the_text_of_its_parts_together():
    mixed = Text.mixture([A, B])
    assert mixed.sha256 != Text(mixed.text, mixed.source).sha256
    assert mixed.sha256 != Text.mixture([B, A]).sha256
    assert mixed.source == "text 0 + text 1"


def test_files_are_mixed(tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, part in zip(files, (A, B), strict=True):
        file.write_text(part.text)
    assert torch.equal(ids(read_text([str(f) for f in files]), 4), ids(Text.mixture([A, B]), 4))


def test_a_text_that_is_too_short_for_its_share_is_named():
    with pytest.raises(CorankError, match="'short'"):
        ids(Text.mixture([A, Text("ALPHA", "short")]), 8)
    with pytest.raises(CorankError, match="empty"):
        read_text([])


def test_the_built_in_texts_have_no_paragraph_in_common():
    one, two = (set(read_text(name).text.split("\n\n")) for name in ("builtin", "builtin-test"))
    assert len(one) > 1000 and len(two) > 300 and not one & two
