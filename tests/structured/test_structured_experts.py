"""Blocks with a mixture of experts: taken away whole, from disk and in memory."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from depth_cases import DATA, logits, some_ids
from safetensors import safe_open

import corank
from tiny import tokenizer


def mixture():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=24, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4)
    config = tf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, sliding_window=None)
    return tf.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("method", ["shortgpt", "mka"])
def test_blocks_of_experts_go_and_the_others_are_stored_as_they_were(method, tmp_path):
    model = mixture()
    model.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    words = tf.AutoTokenizer.from_pretrained(tmp_path / "dense")
    inside = corank.compress(model, method, keep=0.7, tokenizer=words, out=tmp_path / "memory", **DATA)
    streamed = corank.compress(tmp_path / "dense", method, keep=0.7, out=tmp_path / "disk", **DATA)
    assert inside.structure == streamed.structure and inside.ordinary
    for where in ("memory", "disk"):
        loaded, _ = corank.load(tmp_path / where)
        torch.testing.assert_close(logits(loaded, some_ids()), logits(model, some_ids()), rtol=1e-5, atol=1e-6)
        assert sum(p.numel() for p in loaded.parameters()) == inside.accounting["model"]["compressed"]
    if method == "shortgpt":
        names = []
        for folder in ("memory", "disk"):
            with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
                names.append(set(file.keys()))
        assert names[0] == names[1] and any(".experts.3.w" in name for name in names[0])
