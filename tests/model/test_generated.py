"""Text that a model writes itself: the model's own distribution, kept in the cache, usable wherever text is."""

from __future__ import annotations

import json

import pytest
import torch

import corank
from corank.errors import CorankError
from corank.model import generated as module
from corank.model import read_text
from corank.model.generated import write
from tiny import saved, tiny


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "LENGTH", 48)
    return tmp_path


def test_pieces_follow_the_distribution_of_the_model():
    """Second tokens, given the first, come as often as the model says (chi-square over all of them)."""
    model = tiny("llama-gqa")
    model.generation_config.eos_token_id = 2
    ids = write(model, 4000, 2, forbidden=[1], words=8)
    assert (
        ids.shape == (4000, 2)
        and not (ids == 1).any()
        and not (ids[:, 1] == 2).any()
        and ids[:, 0].max() < 8
        and ids[:, 1].max() < 8
    )
    statistic = freedom = 0.0
    for first in ids[:, 0].unique():
        with torch.no_grad():
            logits = model(input_ids=first.view(1, 1)).logits[0, -1]
        logits[[1, 2, *range(8, 64)]] = -torch.inf
        expected = logits.double().softmax(0)[:8] * float((ids[:, 0] == first).sum())
        seen = torch.bincount(ids[ids[:, 0] == first, 1], minlength=8).double()
        often = expected > 5
        statistic += float(((seen - expected)[often] ** 2 / expected[often]).sum())
        freedom += int(often.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_the_same_seed_writes_the_same_and_leaves_the_random_state_alone(monkeypatch):
    model = tiny("gpt2-conv1d")
    state = torch.get_rng_state()
    one = write(model, 5, 12, forbidden=[], words=64)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, write(model, 5, 12, forbidden=[], words=64))
    assert not torch.equal(one, write(model, 5, 12, forbidden=[], words=64, seed=1))
    monkeypatch.setattr(module, "CACHE_BYTES", 1)  # one piece at a time
    assert write(model, 5, 12, forbidden=[], words=64).shape == (5, 12)


def test_it_is_written_once_and_calibrates(room, monkeypatch):
    dense = saved("llama-gqa", room / "dense")
    text = read_text(f"generated:{dense}:9")
    pieces = json.loads(next((room / "cache" / "generated").iterdir()).read_text())
    assert len(pieces) == 9 and text.text == "\n\n".join(pieces) and text.source == f"generated:{dense}:9"
    monkeypatch.setattr(module, "_written", None)  # a second call would fail
    assert read_text(f"generated:{dense}:9") == text
    source = f"generated:{dense}:9"
    report = corank.compress(dense, "svd-llm", keep=0.6, out=room / "small", data=source, samples=8, length=32)
    assert report.data["text"] == source
    assert source in (room / "small" / "README.md").read_text()


def test_another_model_writes_another_text(room):
    one, two = saved("llama-gqa", room / "one"), saved("llama-gqa", room / "two", seed=1)
    assert read_text(f"generated:{one}:2").text != read_text(f"generated:{two}:2").text


def test_what_cannot_write(room):
    dense = saved("llama-gqa", room / "dense")
    with pytest.raises(CorankError, match="no such directory"):
        read_text("generated:nowhere")
    for source in ("generated:", f"generated:{dense}:0"):
        with pytest.raises(CorankError, match="generated:MODEL"):
            read_text(source)
    corank.compress(dense, "svd", keep=0.6, out=room / "small")
    with pytest.raises(CorankError, match="dense model"):
        read_text(f"generated:{room / 'small'}")
    saved("bert", room / "bert")
    with pytest.raises(CorankError, match="cannot write"):
        read_text(f"generated:{room / 'bert'}")


def test_a_tokenizer_without_words():
    with pytest.raises(CorankError, match="nothing to write"):
        write(tiny("llama-gqa"), 1, 4, forbidden=list(range(64)), words=64)
