"""Tall second factors stored by columns: the same model with other strides."""

from __future__ import annotations

import copy

import pytest
import torch
from runtime_models import MODELS, close, outputs

import corank
from corank.runtime import layout, overrides, set_runtime
from corank.runtime.layout import Turned
from factorized import compressed
from tiny import tokenizer


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch):
    monkeypatch.setattr(layout, "SMALL", 1)
    monkeypatch.setattr(layout, "TALL", 1)


def turned(model):
    return [o.module for o in overrides(model) if isinstance(o, Turned)]


@pytest.mark.parametrize("runtime", ["packed", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_computes_the_same_and_is_restored(name, runtime, tmp_path):
    model = MODELS[name]()
    expected, state = outputs(model), {k: v.clone() for k, v in model.state_dict().items()}
    set_runtime(model, runtime, **({"folder": tmp_path} if runtime == "auto" else {}))
    ups = turned(model)
    assert name == "column_pivoted" or ups
    assert all(up.weight.stride() == (1, up.out_features) for up in ups)
    close(outputs(model), expected)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    set_runtime(model, "torch")
    assert all(p.is_contiguous() for p in model.parameters()) and not turned(model)
    found = outputs(model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_model_that_has_been_turned_is_saved_copied_moved_and_trained(tmp_path):
    model = set_runtime(compressed("low_rank", "llama-gqa", ranks=(5, 4, 4), layers=2), "packed")
    expected = outputs(model)
    corank.checkpoint.save(model, tokenizer(), tmp_path / "again")
    loaded, _ = corank.load(tmp_path / "again")
    close(outputs(loaded), expected)
    close(outputs(copy.deepcopy(model)), expected)
    close(outputs(copy.deepcopy(model).double()), expected)
    model.train()
    ids = torch.randint(3, 60, (2, 9))
    plain = set_runtime(copy.deepcopy(model), "torch")
    for each in (model, plain):
        each(input_ids=ids, labels=ids).loss.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_only_tall_matrices_in_float32_on_a_processor_gain(monkeypatch):
    assert not turned(set_runtime(compressed("low_rank", layers=2).to(torch.bfloat16), "packed"))
    monkeypatch.setattr(layout, "TALL", 1000)
    assert not turned(set_runtime(compressed("low_rank", layers=2), "packed"))
    monkeypatch.setattr(layout, "TALL", 1)
    monkeypatch.setattr(layout, "SMALL", 1 << 30)
    assert not turned(set_runtime(compressed("low_rank", layers=2), "packed"))
