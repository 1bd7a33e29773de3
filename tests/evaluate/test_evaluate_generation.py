from __future__ import annotations

import pytest
import torch
from torch import nn

from corank.errors import CorankError
from corank.evaluate import sample
from corank.evaluate.generation import repeated_fraction


def test_greedy_follows_the_largest_score(model, tokenizer):
    result = sample(model, tokenizer, "a b c", 5)
    ids = tokenizer("a b c")["input_ids"]
    new = []
    for _ in range(5):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == 2:
            break
    assert result.tokens == len(new)
    assert result.completion == tokenizer.decode(new, skip_special_tokens=True)
    assert result.prompt == "a b c" and result.temperature == 0


def test_the_seed_decides_and_the_global_state_is_left_alone(make_model, tokenizer):
    model = make_model(initializer_range=0.02)  # nearly uniform
    before = torch.random.get_rng_state()
    texts = [sample(model, tokenizer, "a", 30, seed=s, temperature=1.0).completion for s in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert texts[0] == texts[1] != texts[2]


def test_repetition():
    assert repeated_fraction([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated_fraction([7] * 11) == pytest.approx(1 - 1 / 8)
    assert repeated_fraction([1, 2, 1, 2, 1, 2], n=2) == pytest.approx(1 - 2 / 5)
    assert repeated_fraction([]) == repeated_fraction([1, 2, 3, 4]) == 0.0


def test_the_mode_is_restored(model, tokenizer):
    model.train()
    sample(model, tokenizer, "a", 1)
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a", {"max_new_tokens": 0}, "max_new_tokens"),
        ("a", {"temperature": -1.0}, "temperature"),
        ("a", {"chat": True}, "chat template"),
        ("a", {"max_new_tokens": 100}, "max_new_tokens=62 or less"),
    ],
)
def test_bad_input_says_what_to_do(model, tokenizer, prompt, settings, message):
    with pytest.raises(CorankError, match=message):
        sample(model, tokenizer, prompt, **settings)


def test_things_that_cannot_generate(model, make_tokenizer):
    with pytest.raises(CorankError, match="generate"):
        sample(nn.Linear(2, 2), make_tokenizer(), "a")
    with pytest.raises(CorankError, match="no tokens"):
        sample(model, make_tokenizer(adds_bos=False), "")


def test_a_chat_template_is_used(model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}h {{ m['content'] }} i {% endfor %}"
    chat = sample(model, tokenizer, "a b", 6, chat=True)
    with torch.no_grad():
        ids = torch.tensor([tokenizer("h a b i", add_special_tokens=False)["input_ids"]])
        first = int(model(input_ids=ids).logits[0, -1].argmax())
    assert chat.prompt == "a b"
    assert chat.completion.split()[:1] == tokenizer.decode([first], skip_special_tokens=True).split()
