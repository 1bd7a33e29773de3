"""Checkpoints that store other names and shapes than the model computes with."""

from __future__ import annotations

import pytest
import torch
from families import inputs, logits, make
from table import tensors
from transformers.core_model_loading import Chunk, WeightConverter

import corank
from corank import checkpoint
from corank.model import StreamedModel, Text
from corank.model.names import Stored, catches, unconverted
from tiny import text, tokenizer

DATA = dict(data=Text(text(), "words"), samples=4, length=12, batch=2)


def saved(name, folder, **kwargs):
    make(name).save_pretrained(folder, max_shard_size="30KB", **kwargs)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-neox"])
@pytest.mark.parametrize("original", [True, False])
def test_every_tensor_is_read_as_the_model_computes_with_it(name, original, tmp_path):
    source = StreamedModel(saved(name, tmp_path, save_original_format=original))
    wanted = make(name).state_dict()
    assert (set(tensors(tmp_path)) != set(source.keys)) == original
    assert set(source.keys) == {k for k in wanted}
    for key, value in wanted.items():
        assert torch.equal(source.read(key), value), key


@pytest.mark.parametrize(
    ("name", "targets", "as_before"),
    [
        ("mixtral", ["q", "o"], "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ("gpt-neox", ["qkv", "up"], "embed_out.weight"),
        ("gpt-neox", ["lm_head"], None),
        ("mixtral", ["*.layers.1.*experts.2.down"], None),
    ],
)
def test_what_is_not_compressed_is_stored_as_it_was_if_it_can_be(name, targets, as_before, tmp_path):
    folder, model = saved(name, tmp_path / "dense"), make(name)
    run = dict(method="svd-llm", keep=0.6, targets=targets, **DATA)
    corank.compress(model, tokenizer=checkpoint.load(folder)[1], out=tmp_path / "memory", **run)
    corank.compress(folder, out=tmp_path / "out", **run)
    memory, streamed = tensors(tmp_path / "memory"), tensors(tmp_path / "out")
    assert memory.keys() == streamed.keys() and all(torch.equal(memory[k], streamed[k]) for k in memory)
    assert as_before is None or as_before in streamed
    for written in ("memory", "out"):
        corank.verify(tmp_path / written)
        loaded, _ = checkpoint.load(tmp_path / written)
        found, wanted = loaded.state_dict(), model.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)
    loaded.save_pretrained(tmp_path / "again")  # and once more, by transformers alone
    again, _ = checkpoint.load(tmp_path / "again", tokenizer=False)
    assert torch.equal(logits(again, inputs(name)), logits(loaded, inputs(name)))


def test_a_stored_tensor_that_is_split_is_written_back_only_if_all_its_parts_are_unchanged():
    chunk = WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], [Chunk(dim=0)])
    fused = Stored("q.weight", [("qkv.weight", "qkv.weight")], chunk)
    found = {"q.weight": fused, "k.weight": fused, "v.weight": fused, "o.weight": Stored("o.weight", [("", "o")])}
    everything = {"q.weight": ["qkv.weight"], "k.weight": [], "v.weight": [], "o.weight": ["o"]}
    assert unconverted(found, found) == everything
    assert unconverted(found, set(found) - {"k.weight"}) == {"o.weight": ["o"]}
    whole = torch.arange(6.0).view(6, 1)
    for i, name in enumerate(("q.weight", "k.weight", "v.weight")):
        part = fused.read(name, {"qkv.weight": whole}.__getitem__, make("llama"))
        assert torch.equal(part, whole[2 * i : 2 * i + 2])


def test_names_that_a_conversion_would_catch():
    model = make("mixtral")
    assert catches(model, ["model.layers.0.mlp.experts.gate_up_proj"])
    assert not catches(model, ["model.layers.0.self_attn.q_proj.down.weight"])
    assert not catches(make("llama"), make("llama").state_dict())
