"""What every runtime keeps: the numbers, the state dict, and the model as it was when it is restored."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from runtime_models import MODELS, GatedMLP, batches, close, outputs
from transformers import CompileConfig

from corank import checkpoint
from corank.factors import RowPivoted
from corank.runtime import TIERS, overrides, peak_activation, runtime_of, set_runtime
from corank.runtime.attention import LatentAttention
from corank.runtime.dispatch import Table, choice, measure, stamp
from corank.runtime.mlp import MLP
from corank.runtime.override import _noted
from factorized import compressed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))


def without_cache(model):
    results = {}
    with torch.no_grad():
        for name, batch in batches().items():
            options = {} if "Bert" in type(model).__name__ else {"use_cache": False}
            logits = model(**batch, **options).logits
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            results[name] = logits[mask.bool()]
    return results


@pytest.mark.parametrize("tier", ["flashsvd", "triton", "auto", "graph"])
@pytest.mark.parametrize("name", MODELS)
def test_every_tier_gives_the_same_logits(name, tier):
    model = MODELS[name]()
    expected, plain = outputs(model), without_cache(model)
    keys = list(model.state_dict())
    options = {"least": 1} if tier == "flashsvd" else {}
    assert TIERS[tier](model, **options) is model and runtime_of(model) == tier
    close(outputs(model), expected)
    close(without_cache(model), plain)
    close(without_cache(model), plain)  # what was measured or left behind the first time is used the second time
    assert list(model.state_dict()) == keys
    set_runtime(model, "torch")
    assert not list(overrides(model))
    restored = outputs(model)
    assert all(torch.equal(restored[key], expected[key]) for key in expected)


@pytest.mark.parametrize("tier", ["flashsvd", "auto"])
def test_dtype_and_weights_may_change(tier):
    model = set_runtime(compressed("low_rank", "qwen2-bias", ranks=(5, 4, 4)), tier)
    for override in overrides(model):
        if isinstance(override, LatentAttention):
            override.least = 1
    outputs(model)
    model.to(torch.float64)
    plain = set_runtime(copy.deepcopy(model), "torch")
    close(without_cache(model), without_cache(plain), 1e-12)
    with torch.no_grad():
        for p in (*model.parameters(),):
            p.mul_(1.1)
        for p in (*plain.parameters(),):
            p.mul_(1.1)
    close(without_cache(model), without_cache(plain), 1e-12)


@pytest.mark.parametrize(
    "name,count", [("llama-tied", 1), ("qwen2-bias", 1), ("gemma", 1), ("bert", 1), ("gpt2-conv1d", 0)]
)
def test_attention_from_latents_is_recognised(name, count):
    model = set_runtime(compressed("low_rank", name), "flashsvd")
    found = [o for o in overrides(model) if isinstance(o, LatentAttention)]
    assert len(found) == count and all(o.caches is (name != "bert") for o in found)


def test_attention_from_latents_fills_the_cache_and_leaves_single_tokens_alone():
    model = compressed("low_rank", "llama-gqa", layers=2)
    ids = batches()["batch"]["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    for least in (1, 39, None):
        set_runtime(model, "flashsvd", least=least)
        calls = []
        for override in [o for o in overrides(model) if isinstance(o, LatentAttention)]:
            attend = override.attend

            def counting(x, *rest, attend=attend, calls=calls):
                calls.append(x.shape[:2].numel())
                return attend(x, *rest)

            override.attend = counting
        assert torch.equal(model.generate(ids, **settings), expected)
        assert calls == {1: [39, 39, *([3] * 8)], 39: [39, 39], None: []}[least]


def test_a_decoder_needs_less_memory_for_its_prompt():
    model = compressed("low_rank", "llama-tied", layers=1, ranks=(4,))
    model.config.max_position_embeddings = 512
    ids = torch.randint(3, 60, (2, 500))
    with torch.no_grad():
        set_runtime(model, "chunked")
        plain = peak_activation(lambda: model.model(input_ids=ids))
        set_runtime(model, "flashsvd")
        assert peak_activation(lambda: model.model(input_ids=ids)) < plain


def test_attention_with_more_in_it_is_left_alone():
    import transformers as tf

    from corank.factors import replace, weight_of
    from factorized import factors_of

    torch.manual_seed(0)
    config = tf.Qwen3Config(vocab_size=64, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=6, intermediate_size=37, max_position_embeddings=64)  # fmt: skip
    model = tf.Qwen3ForCausalLM(config).eval()
    for leaf in "qkv":
        site = f"model.layers.0.self_attn.{leaf}_proj"
        replace(model, site, factors_of("low_rank", weight_of(model.get_submodule(site)), 4).module())
    set_runtime(model, "flashsvd")  # it normalises queries and keys
    assert not [o for o in overrides(model) if isinstance(o, LatentAttention)]


def test_an_encoder_needs_less_than_a_third_of_the_memory():
    import transformers as tf

    from corank.factors import LowRank, replace

    torch.manual_seed(0)
    config = tf.BertConfig(vocab_size=64, hidden_size=96, num_hidden_layers=1, num_attention_heads=12,
                           intermediate_size=768, max_position_embeddings=1024)  # fmt: skip
    model = tf.BertModel(config).eval()
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in n]:
        m, n = layer.weight.shape
        replace(model, name, LowRank(torch.randn(m, 16) / 4, torch.randn(16, n) / n**0.5).module(layer.bias))
    ids = torch.randint(3, 60, (2, 1024))
    with torch.no_grad():
        expected, plain = model(ids).last_hidden_state, peak_activation(lambda: model(ids))
        set_runtime(model, "flashsvd", chunk=128)
        actual, peak = model(ids).last_hidden_state, peak_activation(lambda: model(ids))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert peak < 0.3 * plain, (peak, plain)


def test_a_runtime_that_cannot_is_said_once(caplog):
    _noted.clear()
    model = set_runtime(compressed("low_rank", layers=2), "triton")
    with caplog.at_level(logging.DEBUG, "corank.runtime"):
        outputs(model)
        outputs(model)
    said = [record.message for record in caplog.records]
    assert any("the tensors are on the CPU" in line or "not installed" in line for line in said)
    assert len(said) == len(set(said))


def test_graph_generates_the_same_tokens():
    model = compressed("low_rank", "llama-tied", ranks=(4,), layers=1)
    checkpoint.attach(model)
    ids = batches()["batch"]["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, **settings)
    before = model.generation_config.to_dict()
    set_runtime(model, "graph")
    assert torch.equal(model.generate(ids, **settings), plain)  # on a CPU nothing is compiled
    for grouped, due in ((False, 11), (True, 8)):
        products = []

        def backend(graph, inputs, products=products, **options):
            names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            products.append(sum("linear" in name or "bmm" in name for name in names))
            return graph.forward

        torch._dynamo.reset()
        set_runtime(model, "graph", backend=backend, grouped=grouped)
        assert torch.equal(model.generate(ids, **settings), plain)
        assert isinstance(model._last_compile_config, CompileConfig) and model._last_compile_config.fullgraph
        assert products and set(products) == {due + 1}  # and the head
    assert model.generation_config.to_dict() == before
    with torch.no_grad():  # what was packed for the compiler is forgotten outside of `generate`
        for p in model.parameters():
            p.data = p.data * 1.5
    assert all(s.frozen is None for o in overrides(model) if isinstance(o, MLP) for s in [o.siblings.downs])
    again = model.generate(ids, **settings)
    assert torch.equal(again, set_runtime(model, "torch").generate(ids, **settings))
    set_runtime(model, "packed")
    assert torch.equal(model.generate(ids, **settings), again)


def test_auto_measures_once_and_ignores_what_others_measured(tmp_path, monkeypatch):
    mlp = GatedMLP(8, 16, (3, 3, 3))
    set_runtime(mlp, "auto", folder=tmp_path)
    (override,) = overrides(mlp)
    measured = []
    original = __import__("corank.runtime.dispatch", fromlist=["measure"]).measure
    monkeypatch.setattr("corank.runtime.dispatch.measure", lambda *a: measured.append(1) or original(*a))
    with torch.no_grad():
        for tokens in (1, 3, 4, 4, 300):
            torch.testing.assert_close(mlp(torch.ones(tokens, 8)), type(mlp).forward(mlp, torch.ones(tokens, 8)))
    assert len(measured) == 3  # 1, up to 4, up to 512
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert kept["stamp"] == stamp(CPU) and len(kept["entries"]) == 3
    for entry in kept["entries"].values():
        assert entry["choice"] in entry["seconds"] and "torch" in entry["seconds"]
    assert Table(tmp_path).entries(CPU) == kept["entries"]
    for change in ({"torch": "1.0"}, {"device": "another"}, {"threads": 77}):
        file.write_text(json.dumps({**kept, "stamp": {**kept["stamp"], **change}}))
        assert Table(tmp_path).entries(CPU) == {}
    for broken in ("{", "[]", json.dumps({"stamp": kept["stamp"]})):
        file.write_text(broken)
        assert Table(tmp_path).entries(CPU) == {}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    mlp = set_runtime(GatedMLP(8, 16, (3, 3, 3)), "auto", folder=tmp_path / "file")
    with torch.no_grad():
        torch.testing.assert_close(mlp(torch.ones(2, 8)), type(mlp).forward(mlp, torch.ones(2, 8)))


def test_the_choice_never_loses_to_the_plain_way():
    assert choice({"torch": 1.0, "packed": 0.99}) == "torch"
    assert choice({"torch": 1.0, "packed": 0.9}) == "packed"
    assert choice({"torch": 1.0, "plain": 0.99, "packed": 0.98}, lean="plain") == "plain"
    assert choice({"torch": 1.0, "plain": 1.05, "packed": 1.1}, lean="plain") == "torch"
    assert choice({"torch": 1.0, "plain": 0.8, "packed": 0.5}, lean="plain") == "packed"


def test_kernels_see_pivots_that_change():
    from corank.runtime.single import SinglePivoted

    layer = RowPivoted(torch.tensor([0, 2]).int(), torch.randn(2, 5), torch.randn(2, 2)).module()
    override = SinglePivoted(layer)
    assert override.others().tolist() == [1, 3]
    layer.pivots.copy_(torch.tensor([1, 2]))
    layer.finalize()
    assert override.others().tolist() == [0, 3]


@pytest.mark.parametrize("tier", ["chunked", "packed", "triton", "flashsvd", "auto"])
def test_integers_are_left_as_they_are(tier):
    pytest.importorskip("torchao")
    model = compressed("low_rank", layers=1, ranks=(5, 4))
    checkpoint.quantize_factors(model, "int8", group=4)
    expected = outputs(model)
    set_runtime(model, tier)
    close(outputs(model), expected)


def test_a_way_without_enough_memory_is_not_taken():
    def fails():
        raise torch.OutOfMemoryError("too little")

    seconds = measure({"torch": fails, "plain": lambda: None}, CPU)
    assert seconds["torch"] == float("inf") and choice(seconds, lean="plain") == "plain"


def test_ways_are_those_that_are_possible():
    mlp = GatedMLP(6, 9, (2, 3, 3))

    def ways():
        (override,) = [o for o in overrides(set_runtime(mlp, "triton")) if isinstance(o, MLP)]
        return override.ways, override.act

    assert ways() == (("triton", "packed", "plain"), "silu")
    mlp.act_fn = torch.nn.Tanh()
    assert ways() == (("packed", "plain"), None)
