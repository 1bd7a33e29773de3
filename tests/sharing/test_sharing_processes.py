"""Several processes make the groups that one makes: one of them decomposes each, all read the same."""

from __future__ import annotations

import json

import torch
from together import RUNS, compress_all

import corank
from processes import join, start_group
from tiny import saved


def test_two_processes_give_the_result_of_one(tmp_path):
    saved("llama-gqa", tmp_path / "dense", dtype=torch.float64)
    compress_all(0, str(tmp_path), "1")
    assert join(start_group(2, tmp_path / "meeting", compress_all, str(tmp_path), "2")) == [0, 0]
    for run in RUNS:
        one, two = tmp_path / f"{run}-1", tmp_path / f"{run}-2"
        plans = [json.loads((f / "config.json").read_text())["quantization_config"]["plan"] for f in (one, two)]
        assert plans[0]["choices"] == plans[1]["choices"]
        assert any("basis" in choice for choice in plans[0]["choices"].values())
        expected, found = ({n: m for n, m in corank.load(f)[0].named_modules()} for f in (one, two))
        for name, layer in expected.items():
            if hasattr(layer, "dense_weight"):
                W = layer.dense_weight()
                atol = 1e-8 * float(W.abs().max())
                torch.testing.assert_close(found[name].dense_weight(), W, rtol=0, atol=atol, msg=name)
