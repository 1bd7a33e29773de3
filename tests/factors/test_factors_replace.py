"""Putting layers in, getting dense ones back, and packing any kind losslessly."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from corank.errors import CorankError
from corank.factors import Dense, LowRank, as_stock, materialise, replace, shape_of, weight_of


def low_rank(m, n, k=2, bias=None):
    torch.manual_seed(m + n)
    return LowRank(torch.randn(m, k), torch.randn(k, n)).module(bias)


def model():
    inner = {"linear": nn.Linear(5, 7), "plain": nn.Linear(5, 7, bias=False), "conv": Conv1D(7, 5)}
    nn.init.normal_(inner["conv"].bias)
    return nn.ModuleDict({"block": nn.ModuleList([nn.ModuleDict(inner)])})


def test_replace_returns_the_old_layer_and_keeps_the_mode():
    root = model().eval()
    old, new = root.get_submodule("block.0.linear"), low_rank(7, 5, bias=torch.ones(7))
    assert replace(root, "block.0.linear", new) is old
    assert root.get_submodule("block.0.linear") is new and not new.training and not new.up.training
    assert not new.transposed and not new.added_bias
    added = low_rank(7, 5, bias=torch.ones(7))
    replace(root, "block.0.plain", added)
    assert added.added_bias
    again = low_rank(7, 5, bias=torch.ones(7))
    replace(root, "block.0.plain", again)
    assert again.added_bias


def test_conv1d_is_read_and_written_in_its_own_orientation():
    root = model()
    conv = root.get_submodule("block.0.conv")
    x = torch.randn(3, 5)
    assert shape_of(conv) == (7, 5) and weight_of(conv).shape == (7, 5)
    torch.testing.assert_close(materialise(conv)(x), conv(x))
    factorized = low_rank(7, 5, bias=conv.bias)
    replace(root, "block.0.conv", factorized)
    assert factorized.transposed
    back = as_stock(factorized, factorized.transposed)
    assert isinstance(back, Conv1D)
    torch.testing.assert_close(back(x), factorized(x))
    # a dense layer put in the place of a Conv1D becomes one, directly or after a factorized layer
    W = torch.randn(7, 5)
    for _ in range(2):
        replace(root, "block.0.conv", Dense(W).module(conv.bias))
        stock = root.get_submodule("block.0.conv")
        assert isinstance(stock, Conv1D)
        torch.testing.assert_close(stock(x), x @ W.T + conv.bias)


@pytest.mark.parametrize("bias", [None, torch.arange(7.0)])
def test_materialise_gives_a_plain_linear_of_its_own(bias):
    layer = low_rank(7, 5, bias=bias).eval()
    plain = materialise(layer)
    assert type(plain) is nn.Linear and not plain.training and plain.weight.requires_grad
    x = torch.randn(3, 5)
    torch.testing.assert_close(plain(x), layer(x))
    source = nn.Linear(5, 7)
    copy = materialise(source)
    with torch.no_grad():
        copy.weight.zero_()
        copy.bias.zero_()
    assert source.weight.abs().min() > 0
    assert type(materialise(Dense(torch.randn(7, 5)).module())) is nn.Linear


def test_replace_refuses_what_does_not_fit():
    root = model()
    with pytest.raises(CorankError, match="nearest: block.0.linear"):
        replace(root, "block.0.liner", low_rank(7, 5))
    with pytest.raises(CorankError, match="sizes must agree"):
        replace(root, "block.0.linear", low_rank(5, 7))
    with pytest.raises(CorankError, match="not a linear layer"):
        replace(root, "block.0", low_rank(5, 7))
    with pytest.raises(CorankError, match="not a linear layer"):
        materialise(nn.LayerNorm(4))
    with pytest.raises(CorankError):
        replace(root, "", low_rank(5, 7))
