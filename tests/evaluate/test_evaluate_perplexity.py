from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from corank.errors import CorankError
from corank.evaluate import perplexity
from corank.evaluate.perplexity import adds_bos, cut_windows


class Scores(nn.Module):
    """A 'language model' that says the same scores [V] at every position."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.scores.expand(*input_ids.shape, -1))


def naive(model, windows: torch.Tensor) -> list[float]:
    """Mean NLL of each window by the definition, token by token, in float64."""
    means = []
    for ids in windows:
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        terms = [torch.logsumexp(logits[t], 0) - logits[t, ids[t + 1]] for t in range(len(ids) - 1)]
        means.append(float(sum(terms)) / len(terms))
    return means


@pytest.mark.parametrize("bos", [True, False])
def test_equals_the_definition(model, tokenizer, text, bos):
    model = model.double()
    result = perplexity(model, tokenizer, text, window=10, bos=bos)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    take = 9 if bos else 10
    count = len(ids) // take
    rows = [([1] if bos else []) + ids[i * take : (i + 1) * take] for i in range(count)]
    means = torch.tensor(naive(model, torch.tensor(rows)), dtype=torch.float64)
    assert result.windows == count and result.tokens == 9 * count and result.bos is bos
    assert result.nll == pytest.approx(float(means.mean()), rel=1e-12)
    assert result.value == pytest.approx(math.exp(float(means.mean())), rel=1e-12)
    assert result.stderr == pytest.approx(float(means.std()) / math.sqrt(count), rel=1e-12)
    assert result.text_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_uniform_scores_give_the_size_of_the_vocabulary(tokenizer, text):
    model = Scores(torch.zeros(12, dtype=torch.float64))
    assert perplexity(model, tokenizer, text, window=7).value == pytest.approx(12, rel=1e-14)


def test_batch_size_does_not_matter(model, tokenizer, text):
    values = [perplexity(model, tokenizer, text, window=8, batch_size=b).nll for b in (1, 3, 50)]
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-6)


def test_long_windows_are_summed_in_pieces_without_loss(make_model, tokenizer, text):
    model = make_model(max_position_embeddings=1024).double()
    text = " ".join([text] * 5)
    result = perplexity(model, tokenizer, text, window=600, bos=False)
    windows, _ = cut_windows(tokenizer, text, window=600, bos=False)
    assert result.nll == pytest.approx(naive(model, windows)[0], rel=1e-12)


def test_the_incomplete_window_is_dropped(model, tokenizer, text):
    words = text.split()
    full = perplexity(model, tokenizer, " ".join(words[:40]), window=10, bos=False)
    more = perplexity(model, tokenizer, " ".join(words[:49]), window=10, bos=False)
    assert (more.windows, more.nll) == (4, full.nll)


def test_fewer_windows_are_taken_evenly_spaced(tokenizer, text):
    every, _ = cut_windows(tokenizer, text, window=10, bos=False)
    some, _ = cut_windows(tokenizer, text, window=10, bos=False, max_windows=4)
    assert torch.equal(some, every[[i * len(every) // 4 for i in range(4)]])
    assert torch.equal(cut_windows(tokenizer, text, window=10, bos=False, max_windows=10**6)[0], every)


@pytest.mark.parametrize(("adds", "expected"), [(True, True), (False, False)])
def test_auto_follows_the_tokenizer(model, make_tokenizer, text, adds, expected):
    tokenizer = make_tokenizer(adds_bos=adds)
    assert adds_bos(tokenizer) is expected
    auto = perplexity(model, tokenizer, text, window=8)
    forced = perplexity(model, tokenizer, text, window=8, bos=expected)
    other = perplexity(model, tokenizer, text, window=8, bos=not expected)
    assert (auto.bos, auto.nll) == (expected, forced.nll)
    assert auto.nll != other.nll


def test_no_bos_token(model, make_tokenizer, text):
    tokenizer = make_tokenizer(adds_bos=False, bos=False)
    assert perplexity(model, tokenizer, text, window=8).bos is False
    with pytest.raises(CorankError, match="no BOS token"):
        perplexity(model, tokenizer, text, window=8, bos=True)


@pytest.mark.parametrize(("poison", "check"), [(math.nan, math.isnan), (-math.inf, math.isinf)])
def test_a_collapsed_model_is_reported_not_refused(tokenizer, text, poison, check):
    scores = torch.zeros(12)
    scores[5] = poison  # -inf for one word: probability 0, loss +inf
    result = perplexity(Scores(scores), tokenizer, text, window=8)
    assert check(result.value) and not result.finite
    assert math.isinf(perplexity(Scores(torch.arange(12.0) * 1e4), tokenizer, text, window=8).value)


def test_one_window_has_no_standard_error(model, tokenizer, text):
    assert math.isnan(perplexity(model, tokenizer, text, window=8, max_windows=1).stderr)


def test_the_mode_and_the_graph_of_the_model_are_left_alone(model, tokenizer, text):
    seen = []
    model.train()
    perplexity(model, tokenizer, text, window=10, batch_size=2, progress=lambda *step: seen.append(step))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert seen[-1] == (22, 22) and [s[0] for s in seen] == list(range(2, 23, 2))


def test_several_texts_are_joined_by_blank_lines(model, tokenizer, text):
    joined = perplexity(model, tokenizer, f"{text}\n\n{text}", window=8)
    assert perplexity(model, tokenizer, [text, text], window=8).text_sha256 == joined.text_sha256


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("a b c", {"window": 10}, "more text or a smaller window"),
        ("", {"window": 4}, "more text"),
        ("a b c", {"window": 1}, "nothing to predict"),
        ("a b c", {"window": 65}, "give window=64 or less"),
        ("a b c", {"window": 2, "batch_size": 0}, "batch_size"),
        ("a b c", {"window": 2, "max_windows": 0}, "max_windows"),
    ],
)
def test_bad_input_says_what_to_do(model, tokenizer, text, settings, message):
    with pytest.raises(CorankError, match=message):
        perplexity(model, tokenizer, text, **settings)
