"""Every architecture that corank is tested with runs in every tier and computes what it computed."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from corank.factors import LowRank, is_conv1d, replace, take_apart, weight_of
from corank.runtime import overrides, set_runtime

TIERS = {
    "chunked": {"chunk": 3},
    "packed": {"chunk": 3, "grouped": True},
    "flashsvd": {"chunk": 3, "least": 1},
    "triton": {},
}


def _families():
    path = Path(__file__).parents[1] / "architectures" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    module = sys.modules.setdefault("families", importlib.util.module_from_spec(spec))
    if not hasattr(module, "FAMILIES"):
        spec.loader.exec_module(module)
    return module


families = _families()


def factorized(name):
    """The model with factors of small ranks wherever the layers read the hidden state."""
    model = families.make(name)
    take_apart(model)
    ranks = itertools.cycle([4, 3, 5])
    plain = [n for n, layer in model.named_modules() if type(layer) is nn.Linear or is_conv1d(layer)]
    for site in plain:
        layer = model.get_submodule(site)
        W = weight_of(layer)
        if min(W.shape) < 8 or site.rsplit(".", 1)[-1] in ("gate", "router", "lm_head", "classifier"):
            continue
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        k = next(ranks)
        replace(model, site, LowRank(U[:, :k] * S[:k], Vh[:k]).module(layer.bias))
    return model.eval()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_architecture_runs_in_every_tier(name):
    model, given = factorized(name), families.inputs(name)
    expected = families.logits(model, given)
    for tier, options in TIERS.items():
        set_runtime(model, tier, **options)
        actual = families.logits(model, given)
        error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert torch.isfinite(actual).all() and error <= 3e-5, (tier, float(error))
    set_runtime(model, "torch")
    assert not list(overrides(model))
    torch.testing.assert_close(families.logits(model, given), expected, rtol=0, atol=0)
