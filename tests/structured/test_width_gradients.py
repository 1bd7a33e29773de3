"""LLM-Pruner's score is the sum of |w dL/dw| over all weights of a unit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from width_blocks import llama

from corank.errors import CorankError
from corank.model import ResidentModel
from corank.structured.sensitivity import first_order
from tiny import tiny, windows


def test_first_order_sums_are_those_of_autograd():
    model, data = tiny("llama-gqa", dtype=torch.float64), windows(4, 12)
    source = ResidentModel(model)
    found = first_order(source, data, 2)
    logits = model(data.ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), data.ids[:, 1:].flatten(), reduction="sum").backward()
    for site in source.outline.sites:
        W = model.get_submodule(site.name).weight
        size = (W * W.grad).abs() / data.ids.numel()
        rows, columns = found[site.name]
        # logits are cast to float32 in the loss of a sweep
        assert torch.allclose(rows, size.sum(1), rtol=1e-3, atol=1e-6 * float(size.sum()))
        assert torch.allclose(columns, size.sum(0), rtol=1e-3, atol=1e-6 * float(size.sum()))


def test_a_dead_unit_means_nothing():
    model = llama(mlp_bias=False)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[4] = mlp.up_proj.weight[4] = mlp.down_proj.weight[:, 4] = 0.0
    found = first_order(ResidentModel(model), windows(2, 12), 2)
    assert float(found["model.layers.1.mlp.down_proj"][1][4]) == 0.0
    assert float(found["model.layers.1.mlp.up_proj"][0][4]) == 0.0
    assert (found["model.layers.1.mlp.down_proj"][1] > 0).sum() == 36


def test_gradients_need_text():
    with pytest.raises(CorankError, match="text"):
        first_order(ResidentModel(llama()), None, 2)
