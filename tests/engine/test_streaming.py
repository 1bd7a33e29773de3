"""Streaming block by block is the model itself, exactly; so are the statistics and the gradients taken on the way."""

from __future__ import annotations

import pytest
import torch

import corank
from corank.engine.gradients import draw, next_token_loss, sweep
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.model import ResidentModel, StreamedModel, Text
from corank.statistics import InputGram
from tiny import MODELS, saved, text, tiny, windows


def stream_logits(source, ids, mask=None):
    with source.outside(head=False):
        inputs = source.inputs(ids, mask)
    hidden = inputs.hidden
    with torch.no_grad():
        for layer in range(source.outline.layers):
            with source.block(layer) as block:
                hidden = source.run(block, hidden, inputs.calls[layer])
        with source.outside(head=True):
            return source.logits(ids, mask, hidden)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_streamed_logits_are_those_of_the_model(name, padded, tmp_path):
    model, data = tiny(name), windows(4, 12, padded=padded)
    source = StreamedModel(saved(name, tmp_path, shard="20KB"))
    kwargs = {} if data.mask is None else {"attention_mask": data.mask.long()}
    with torch.no_grad():
        expected = model(input_ids=data.ids, **kwargs).logits
    found = stream_logits(source, data.ids, data.mask)
    real = torch.ones_like(data.ids, dtype=torch.bool) if data.mask is None else data.mask
    assert torch.equal(found[real], expected[real])


def test_only_the_block_in_use_has_weights(tmp_path):
    source = StreamedModel(saved("llama-gqa", tmp_path))
    blocks = source.model.get_submodule(source.outline.blocks)

    def resident(module):
        return sum(not p.is_meta for p in module.parameters())

    assert resident(source.model) == 0
    with source.block(1) as block:
        assert resident(block) == len(list(block.parameters()))
        assert resident(source.model) == resident(block)
    assert resident(source.model) == 0
    with source.outside(head=False):
        assert resident(blocks) == 0 and source.model.lm_head.weight.is_meta
        assert not source.model.get_input_embeddings().weight.is_meta
    assert resident(source.model) == 0


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d", "bert"])
def test_streamed_statistics_are_those_of_hooks_on_the_whole_model(name, tmp_path):
    model, data = tiny(name, dtype=torch.float64), windows(5, 12, padded=True)
    source = ResidentModel(model)
    stream = Stream(source, data, batch=2)
    grams = {s.group: InputGram(s.shape[1]) for s in source.outline.sites}
    for layer in range(source.outline.layers):
        leaders = {s.group: s for s in reversed(source.outline.in_layer(layer))}
        observers = {
            source.outline.local(s): lambda x, mask, g=group: grams[g].update(x, mask) for group, s in leaders.items()
        }
        with source.block(layer) as block:
            stream.set_hidden(layer, [stream.observe(block, layer, i, observers) for i in range(len(stream))])
    whole = {s.name: InputGram(s.shape[1]) for s in source.outline.sites}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _m, args, g=g: g.update(args[0], data.mask))
        for n, g in whole.items()
    ]
    with torch.no_grad():
        model(input_ids=data.ids, attention_mask=data.mask.long())
    for handle in handles:
        handle.remove()
    for site in source.outline.sites:
        expected = whole[site.name].result().G
        torch.testing.assert_close(grams[site.group].result().G, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-bias", "gpt2-conv1d"])
@pytest.mark.parametrize("rounds", ["one", "many"])
def test_the_gradient_sweep_is_back_propagation(name, rounds, monkeypatch):
    model, data = tiny(name, dtype=torch.float64), windows(4, 10, padded=True)
    if rounds == "many":
        monkeypatch.setattr("corank.engine.gradients.ACTIVATION_BYTES", 1)
    source = ResidentModel(model)
    found, parts = {}, []

    def keep(layer, part, table):
        parts.append((layer, part.first, part.last))
        for name, named in table.items():
            for kind, statistic in named.items():
                known = found.setdefault(name, {}).get(kind)
                found[name][kind] = statistic if known is None else known.merge(statistic)

    sweep(source, data, 2, source.outline.sites, ["fisher", "gradient"], lambda *_: None, keep)
    layers = range(source.outline.layers)
    many = [[(layer, start, not start) for layer in reversed(layers)] for start in (True, False)]
    assert parts == (sum(many, []) if rounds == "many" else [(layer, True, True) for layer in reversed(layers)])
    expected = {s.name: torch.zeros(s.shape[1], dtype=torch.float64) for s in source.outline.sites}
    for i in range(len(data.ids)):
        ids, mask = data.ids[i : i + 1], data.mask[i : i + 1]
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        next_token_loss(logits, ids, mask, causal=True).backward()
        for site in source.outline.sites:
            gradient = model.get_submodule(site.name).weight.grad
            gradient = gradient.T if name == "gpt2-conv1d" else gradient
            expected[site.name] += gradient.square().sum(0) / len(data.ids)
    for site in source.outline.sites:
        # the loss is taken in float32
        torch.testing.assert_close(
            found[site.name]["fisher"].result().columns, expected[site.name], rtol=1e-4, atol=1e-12
        )
        assert found[site.name]["gradient"].result().R.shape == (site.shape[0], site.shape[0])


def test_activations_that_are_not_finite_name_the_layer():
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    source = ResidentModel(model)
    stream = Stream(source, windows(), 3)
    with source.block(0) as block, torch.no_grad():
        stream.set_hidden(0, [stream.run(block, 0, i) for i in range(len(stream))])
    with source.block(1) as block, torch.no_grad(), pytest.raises(CorankError, match="layer 1"):
        stream.set_hidden(1, [stream.run(block, 1, i) for i in range(len(stream))])


def test_truncated_and_missing_shards_are_one_sentence(tmp_path):
    folder = saved("llama-gqa", tmp_path / "m", shard="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorankError, match="truncated or corrupt"):
        StreamedModel(folder)
    shard.unlink()
    with pytest.raises(CorankError, match="lacks the shard"):
        StreamedModel(folder)


def test_drawn_labels_give_the_curvature_of_the_predictions():
    """E[(p - e_y)(p - e_y)^T] over labels y drawn from p is diag(p) - p p^T, the Hessian of the loss."""
    z = torch.randn(1, 1, 5, dtype=torch.float64)
    p = torch.softmax(z[0, 0], -1)
    drawn = draw(z.expand(1, 200_000, 5), torch.Generator().manual_seed(0))
    g = p - torch.nn.functional.one_hot(drawn[0], 5)
    torch.testing.assert_close(g.T @ g / len(g), torch.diag(p) - torch.outer(p, p), rtol=0, atol=4e-3)


def test_the_gradient_at_a_token_does_not_depend_on_how_many_there_are():
    """Losses are summed, so that E[g g^T] is per token and its quadratic form is in nats per token."""
    logits = torch.randn(3, 6, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[2, 4:] = False
    whole = torch.autograd.grad(next_token_loss(logits, ids, mask, True), logits)[0]
    for i, length in enumerate((6, 6, 4)):
        part = logits[i : i + 1, :length]
        alone = torch.autograd.grad(next_token_loss(part, ids[i : i + 1, :length], None, True), logits)[0]
        torch.testing.assert_close(whole[i], alone[i], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{"target": "anchored"}, {"update": True}], ids=["anchored", "update"])
def test_both_streams_are_computed_in_another_dtype_than_what_is_stored(settings, tmp_path):
    """A bfloat16 model on the CPU: computed in float32, on factors that are rounded as they are stored."""
    folder = saved("llama-gqa", tmp_path / "dense", dtype=torch.bfloat16)
    data = dict(data=Text(text(), "words"), samples=6, length=16, batch=3)
    for out, extra in (("once", {}), ("again", settings)):
        corank.compress(folder, "svd-llm", keep=0.6, out=tmp_path / out, **extra, **data)
    once, again = (corank.load(tmp_path / out)[0] for out in ("once", "again"))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.q_proj"  # nothing has drifted in front of it; what is behind differs
    torch.testing.assert_close(
        again.get_submodule(name).dense_weight(), once.get_submodule(name).dense_weight(), rtol=0.05, atol=0.02
    )
    name = "model.layers.2.mlp.down_proj"
    assert not torch.equal(again.get_submodule(name).dense_weight(), once.get_submodule(name).dense_weight())
