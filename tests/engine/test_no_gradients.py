"""Where there are no gradients, a recipe that says how goes on without; others say so."""

from __future__ import annotations

import pytest
import torch

import corank
from corank.engine.gradients import NoGradients, _expected
from corank.errors import CorankError
from corank.model import Text
from tiny import text, tiny, tokenizer

DATA = dict(data=Text(text(), "words"), samples=6, length=16, batch=4, tokenizer=tokenizer())


def cut(model):
    """A model behind whose last layer no gradient passes, as behind an integer kernel."""
    inner = model.lm_head.forward
    model.lm_head.forward = lambda x: inner(x.detach())
    return model


@pytest.mark.parametrize("settings", [{}, {"ignore": "down"}])
def test_best_falls_back_to_the_inputs_alone(settings):
    model, other = cut(tiny("llama-gqa")), tiny("llama-gqa")
    with pytest.warns(UserWarning, match="no gradient through") as found:
        corank.compress(model, "best", keep=0.7, **DATA, **settings)
    assert len([w for w in found if "gradient" in str(w.message)]) == 1
    corank.compress(other, "svd-llm", keep=0.7, pack=True, **DATA, **settings)
    del model.lm_head.forward
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_examples_have_no_gradients():
    model = tiny("llama-gqa")
    rest = {k: v for k, v in DATA.items() if k not in ("data", "tokenizer", "samples", "length")}
    items = [{"input_ids": torch.arange(3, 35).reshape(2, 16)}]
    with pytest.warns(UserWarning, match="Going on with inputs alone"):
        corank.compress(model, keep=0.7, data=items, **rest)
    with pytest.raises(CorankError, match="svd-llm"):
        corank.compress(tiny("llama-gqa"), "kfac-svd", keep=0.7, data=items, **rest)


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="boom"), _expected():
        raise RuntimeError("boom")
    with pytest.raises(NoGradients), _expected():
        torch.zeros(2).sum().backward()
