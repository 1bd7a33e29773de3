"""LoRA on factors and on products: what is wrapped, trained, saved, loaded and merged, for every factorized kind."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from corank import checkpoint
from corank.errors import CorankError
from corank.factors import CURLinear, FactorizedEmbedding, FactorizedLinear, replace, weight_of
from corank.heal import load_lora, lora_config, merge_lora
from factorized import KINDS_AND_SHARED, compressed, factors_of, linears, logits, loss, step, stir, tied_in_factors

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PLACES = ("factors", "product", "all-linear")


def config_for(model, place, **settings):
    if place == "all-linear":
        return peft.LoraConfig(target_modules="all-linear", r=2, lora_alpha=4, **settings)
    return lora_config(model, 2, place, **settings)


def adapters(model):
    """Name in the bare model -> LoRA layer."""
    prefix = "base_model.model."
    found = {n.removeprefix(prefix): m for n, m in model.named_modules()}
    return {n: m for n, m in found.items() if isinstance(m, peft.tuners.lora.LoraLayer)}


def bare_state(model):
    """Everything but the adapters, under the names it has without them."""
    state = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    return {k.removeprefix("base_model.model.").replace(".base_layer", ""): v.clone() for k, v in state.items()}


def places(model, place):
    """Names of what should be wrapped."""
    factorized = {n: m for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    dense = {n for n in linears(model) if n.rpartition(".")[0] not in factorized}
    if place == "product":
        return dense | set(factorized)
    parts = {f"{n}.{part}": (m, part) for n, m in factorized.items() for part, _ in m.named_children()}
    if place == "all-linear":
        return dense | parts.keys()
    fixed = {n for n, (m, part) in parts.items() if isinstance(m, CURLinear) and part in ("down", "up")}
    empty = {n for n, (m, part) in parts.items() if getattr(m, part).weight.numel() == 0}
    return dense | parts.keys() - fixed - empty


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS_AND_SHARED)
def test_adapters_train_merge_save_and_load(kind, place, tmp_path):
    model = compressed(kind)
    specs, due = checkpoint.collect(model), places(model, place)
    model = peft.get_peft_model(model, config_for(model, place))
    assert adapters(model).keys() == due
    before, start = bare_state(model), loss(model).item()
    step(model)
    assert loss(model).item() < start
    after = bare_state(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    stir(model)
    trained = logits(model.eval())
    assert not torch.allclose(trained, logits(compressed(kind)), atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    if place == "product":
        with pytest.raises(ValueError, match="is not supported"):  # PEFT alone stops
            peft.PeftModel.from_pretrained(compressed(kind), tmp_path / "adapter")
        again = load_lora(compressed(kind), tmp_path / "adapter")
    else:
        again = peft.PeftModel.from_pretrained(compressed(kind), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), trained)

    together = place == "product" and kind == "shared"
    merged = merge_lora(model) if together else model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-3, atol=1e-4)
    checkpoint.save(merged, None, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    now = checkpoint.collect(loaded)
    if place == "product":
        growth = {now[name]["rank"] - specs[name]["rank"] for name in specs}
        assert growth == ({4, 6} if kind == "shared" else {2})  # of a group, the sum over its members
        assert {spec["kind"] for spec in now.values()} <= ({"low_rank"} if kind == "cur" else {kind, "low_rank"})
    else:
        assert now == specs


@pytest.mark.parametrize("kind", KINDS_AND_SHARED)
def test_merging_a_product_can_keep_the_rank(kind):
    model = compressed(kind)
    ranks = {name: spec["rank"] for name, spec in checkpoint.collect(model).items()}
    model = peft.get_peft_model(model, lora_config(model, 2, "product"))
    stir(model, 0.05)
    trained = logits(model.eval())
    grown = merge_lora(copy.deepcopy(model))
    kept = merge_lora(model, keep_rank=True)
    assert {name: spec["rank"] for name, spec in checkpoint.collect(kept).items()} == ranks
    assert sum(p.numel() for p in kept.parameters()) < sum(p.numel() for p in grown.parameters())
    assert not torch.allclose(logits(kept), trained, atol=1e-4)  # it is an approximation
    torch.testing.assert_close(logits(grown), trained, rtol=1e-3, atol=1e-4)


def test_a_product_adapter_is_the_update_of_the_dense_layer():
    """The forward pass and the delta PEFT reports are those of LoRA on the multiplied-out layer."""
    model = compressed("cur", ranks=(6,))
    dense = checkpoint.dequantize(copy.deepcopy(model))
    model = peft.get_peft_model(model, lora_config(model, 3, "product", alpha=5.0))
    dense = peft.get_peft_model(dense, peft.LoraConfig(target_modules="all-linear", r=3, lora_alpha=5.0))
    for name, layer in adapters(dense).items():
        stir(layer, seed=len(name))
        stir(adapters(model)[name], seed=len(name))
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    merged, dense = merge_lora(model), dense.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["low_rank", "row_pivoted"])
def test_adapters_can_be_merged_taken_back_and_switched_off(kind):
    model = compressed(kind)
    bare = logits(model)
    config = lora_config(model, 2, "product", lora_bias=True)
    model = peft.get_peft_model(model, config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    stir(model)
    both = logits(model.eval())
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), both, rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    with model.disable_adapter():  # unmerges
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), both)
    merged = merge_lora(model)
    torch.testing.assert_close(logits(merged), both, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        next(p for n, p in merged.named_parameters() if n.endswith("up.bias") or n.endswith("q_proj.bias")).add_(1)
    assert not torch.allclose(logits(merged), both, atol=1e-2)  # the bias that came with the adapters is used


def test_broken_adapters_are_not_merged_safely():
    model = compressed("low_rank")
    model = peft.get_peft_model(model, lora_config(model, 2, "product"))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(ValueError, match="seems to be broken"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("place", ["factors", "product"])
def test_conv1d_sites_and_layers_that_become_dense(place, tmp_path):
    """GPT-2 stores weights transposed; at a high rank the merged factors would be larger than the matrix."""
    model = compressed("column_pivoted", "gpt2-conv1d", ranks=(20, 3))
    replace(model, "transformer.h.0.mlp.c_fc", factors_of("low_rank", torch.randn(96, 24), 24).module(torch.ones(96)))
    config = lora_config(model, 8, place)
    model = peft.get_peft_model(model, config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    stir(model, 0.1)
    trained = logits(model.eval())
    by_peft = copy.deepcopy(model).merge_and_unload()
    merged = merge_lora(model)
    for result in (by_peft, merged):
        torch.testing.assert_close(logits(result), trained, rtol=1e-3, atol=1e-4)
    dense = [n for n, m in merged.named_modules() if type(m).__name__ == "Conv1D"]
    assert bool(dense) == (place == "product")
    checkpoint.save(merged, None, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(merged))


def test_the_head_is_left_alone_dense_or_factorized():
    model = compressed("low_rank")
    for _ in range(2):
        for place in ("factors", "product"):
            assert not any("lm_head" in name for name in lora_config(model, 2, place).target_modules)
        replace(model, "lm_head", factors_of("low_rank", weight_of(model.lm_head), 9).module())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))  # PEFT's own does take it
    stir(wrapped)
    trained = logits(wrapped)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), trained, rtol=1e-3, atol=1e-4)


def test_targets_are_chosen_as_for_compression():
    model = compressed("low_rank", ranks=(5,), layers=3)
    names = lora_config(model, 4, "product", targets=["q", "*.mlp.*"], ignore=["re:layers\\.1\\."]).target_modules
    assert names == {
        f"model.layers.{i}.{x}_proj" for i in (0, 2) for x in ("self_attn.q", "mlp.gate", "mlp.up", "mlp.down")
    }
    config = lora_config(model, 4, "factors", targets=["o"], alpha=3, dropout=0.1, task_type="CAUSAL_LM")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (4, 3, 0.1, "CAUSAL_LM")
    assert config.target_modules == {f"model.layers.{i}.self_attn.o_proj.{p}" for i in range(3) for p in ("up", "down")}


def test_half_precision(tmp_path):
    model = compressed("low_rank", dtype=torch.bfloat16)
    model = peft.get_peft_model(model, lora_config(model, 2, "product"))
    stir(model, 0.1)
    trained = logits(model)
    merged = merge_lora(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(merged).float(), trained.float(), rtol=0.1, atol=0.1)


def test_bad_input(tmp_path, monkeypatch):
    model = compressed("shared")
    for call, words in (
        (lambda: lora_config(model, on="weights"), "place for adapters 'weights'"),
        (lambda: lora_config(model, 0), "at least 1, got 0"),
        (lambda: lora_config(model, targets=["qq"]), "Unknown role or site 'qq'"),
        (lambda: lora_config(torch.nn.ReLU()), "no linear layers"),
        (lambda: merge_lora(model), "no adapters to merge"),
        (lambda: load_lora(model, tmp_path), "no adapter_config.json"),
        (
            lambda: peft.get_peft_model(model, lora_config(model, on="product", use_dora=True)),
            "needs the weight itself",
        ),
        (
            lambda: peft.get_peft_model(
                compressed("low_rank"), lora_config(model, 2, "product", init_lora_weights="pissa")
            ),
            "init_lora_weights='pissa' rewrites",
        ),
    ):
        with pytest.raises(CorankError, match=words):
            call()
    adapted = peft.get_peft_model(compressed("shared"), lora_config(model, 2, "product"))
    with pytest.raises(CorankError, match=r"share a basis are merged together; call corank.heal.merge_lora"):
        adapted.merge_and_unload()
    with pytest.raises(CorankError, match="has adapters already"):
        lora_config(adapted.get_base_model())
    adapted = peft.get_peft_model(compressed("low_rank"), lora_config(compressed("low_rank"), 2))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CorankError, match="does not fit this model"):
        load_lora(compressed("low_rank", ranks=(7,)), tmp_path / "adapter")
    with pytest.raises(CorankError, match="carry adapters"):
        checkpoint.dequantize(adapted.get_base_model())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CorankError, match=r"pip install 'corank\[train\]'"):
        lora_config(model)


def test_embeddings_are_left_alone():
    model = compressed("low_rank")
    due = lora_config(model, 2, "product").target_modules
    table = model.model.embed_tokens
    model.model.embed_tokens = FactorizedEmbedding.replacing(table, factors_of("low_rank", table.weight.detach().T, 6))
    for place in ("factors", "product"):
        assert not any("embed" in name for name in lora_config(model, 2, place).target_modules)
    assert lora_config(model, 2, "product").target_modules == due


def test_a_head_that_the_embedding_reads_takes_no_adapters():
    model = tied_in_factors()
    adapted = peft.get_peft_model(model, lora_config(model, 2, "product"))
    stir(adapted)
    trained = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), trained, rtol=1e-3, atol=1e-4)
    adapted = peft.get_peft_model(tied_in_factors(), config_for(model, "all-linear"))  # PEFT's own choice takes it
    with pytest.raises(CorankError, match="leaves the head alone"):
        logits(adapted)


@pytest.mark.parametrize("place", ["factors", "product"])
def test_the_adapter_interface_of_transformers(place, tmp_path):
    checkpoint.save(compressed("row_pivoted"), None, tmp_path / "base")
    model, again = (AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    model.add_adapter(lora_config(model, 2, place))
    stir(model)
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    with pytest.raises(CorankError, match="carries adapters"):
        checkpoint.save(model, None, tmp_path / "out")
    if place == "factors":
        again.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits(again), trained)
    else:
        assert torch.equal(logits(load_lora(again, tmp_path / "adapter")), trained)
