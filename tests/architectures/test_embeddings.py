"""Embeddings and heads: sites when they are asked for, one pair of factors where they are one matrix."""

from __future__ import annotations

import json

import pytest
import torch
from families import inputs, logits, make
from safetensors import safe_open

import corank
from corank import checkpoint
from corank.engine.forms import new_statistics, results_for, take_in
from corank.errors import CorankError
from corank.factors import FactorizedEmbedding, LowRank, TiedEmbedding, scale_of, weight_of
from corank.model import Text, outline
from tiny import text, tokenizer

TEXT = Text(text(), "words")
DATA = dict(data=TEXT, samples=4, length=12, batch=2)
ENDS = ["embed", "lm_head"]


def saved(name, folder):
    make(name).save_pretrained(folder, max_shard_size="20KB")
    tokenizer().save_pretrained(folder)
    return folder


def stored_keys(folder):
    keys = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            keys += reader.keys()
    return keys


def values(model):
    """Stored values: parameters, and the indices of pivots."""
    pivots = [b.numel() for n, b in model.named_buffers() if n.endswith("pivots")]
    return sum(p.numel() for p in model.parameters()) + sum(pivots)


def same(model, loaded, name):
    found, wanted = loaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)
    torch.testing.assert_close(logits(loaded, inputs(name)), logits(model, inputs(name)))


def test_they_are_left_alone_unless_asked_for():
    plan = outline(make("llama").config)
    assert [s.role for s in plan.optional] == ENDS and all(s.outside and s.block is None for s in plan.optional)
    report = corank.compress(make("llama"), "svd", keep=0.7)
    assert not {"embed", "lm_head"} & {r["role"] for r in report.sites}


@pytest.mark.parametrize("settings", [{}, dict(allocate="lagrange"), dict(pack=True)], ids=str)
@pytest.mark.parametrize("targets", [["embed"], ["lm_head"], [*ENDS, "q", "down"]], ids=str)
def test_untied_ends_are_sites_like_others(targets, settings, tmp_path):
    folder, model = saved("llama", tmp_path / "dense"), make("llama")
    run = dict(method="svd-llm", keep=0.6, targets=targets, **settings, **DATA)
    report = corank.compress(model, tokenizer=tokenizer(), **run)
    corank.compress(folder, out=tmp_path / "out", **run)
    loaded, _ = checkpoint.load(tmp_path / "out")
    same(model, loaded, "llama")
    corank.verify(tmp_path / "out")
    rows = {r["role"]: r for r in report.sites}
    assert set(rows) == set(targets)
    for role in set(targets) & set(ENDS):
        assert rows[role]["layer"] is None and (0 < rows[role]["loss"] < 1 or rows[role]["kind"] == "dense")
        assert rows[role]["loss"] == pytest.approx(rows[role]["predicted_loss"], abs=1e-4)
    if "embed" in targets:
        assert rows["embed"]["flops_dense"] == 0 and rows["embed"]["kind"] in ("low_rank", "dense")
    if targets == ["lm_head"] and settings.get("pack"):
        assert rows["lm_head"]["kind"] == "row_pivoted"
    sites, whole = report.accounting["sites"], report.accounting["model"]
    assert sites["compressed"] <= 0.6 * sites["dense"]
    assert values(loaded) == whole["compressed"]


@pytest.mark.parametrize(
    ("name", "role"),
    [("llama-tied", "embed"), ("gpt2", "lm_head"), ("gemma3", "embed"), ("bert", "lm_head"), ("falcon", "embed")],
)
def test_tied_ends_share_one_pair_of_factors(name, role, tmp_path):
    folder, model = saved(name, tmp_path / "dense"), make(name)
    tied = weight_of(model.get_input_embeddings()).clone()
    words = checkpoint.load(folder)[1]
    run = dict(method="svd-llm", keep=0.6, targets=[role], **DATA)
    report = corank.compress(model, tokenizer=words, out=tmp_path / "memory", **run)
    corank.compress(folder, out=tmp_path / "out", **run)
    assert len(report.sites) == 1 and report.accounting["sites"]["dense"] == tied.numel()
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, TiedEmbedding) and not list(embedding.parameters())
    head = model.get_submodule(report.sites[0]["name"])
    assert torch.equal(embedding.dense_weight(), head.dense_weight().T)
    torch.testing.assert_close(logits(model, inputs(name)), oracle(name, head.dense_weight()), rtol=1e-4, atol=1e-4)
    for written in (tmp_path / "out", tmp_path / "memory"):
        loaded, _ = checkpoint.load(written)
        same(model, loaded, name)
        corank.verify(written)
        assert not json.loads((written / "config.json").read_text())["tie_word_embeddings"]
        keys = stored_keys(written)
        assert sum(".down.weight" in k for k in keys) == 1 and len(keys) == len(set(keys))
    # dense again, the two are one matrix again
    dense = corank.dequantize(loaded)
    assert (
        dense.config.tie_word_embeddings and dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    )
    assert type(dense.get_input_embeddings()) is type(make(name).get_input_embeddings())
    dense.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(again, inputs(name)), logits(model, inputs(name)), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in make(name).parameters())


def oracle(name, W):
    """Logits of the dense model whose one embedding matrix is W."""
    model = make(name)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(W)
    return logits(model, inputs(name))


def test_a_scaled_embedding_stays_scaled(tmp_path):
    model = make("gemma2")
    old = model.get_input_embeddings()
    ids = inputs("gemma2")["input_ids"]
    factors = LowRank(torch.eye(24), weight_of(old))
    layer = FactorizedEmbedding.replacing(old, factors)
    assert scale_of(old) == pytest.approx(24**0.5, rel=1e-3)
    torch.testing.assert_close(layer(ids), old(ids))
    again = layer.as_stock()
    assert type(again) is type(old) and torch.equal(again(ids), old(ids))
    empty = FactorizedEmbedding.from_spec(layer.spec(), False)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(ids), layer(ids)) and empty.spec() == layer.spec()


def test_an_embedding_is_measured_by_how_often_tokens_occur():
    site = next(s for s in outline(make("llama").config).optional if s.role == "embed")
    statistics = new_statistics({"gram", "moments"}, site)
    ids = torch.tensor([[5, 5, 7, 0], [5, 9, 63, 1]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    for statistic in statistics.values():
        take_in(statistic, site, torch.nn.Identity(), ids, mask)
    found = results_for(site, statistics, {"gram", "moments"})
    X = torch.nn.functional.one_hot(ids[mask], 64).double()
    everything = torch.cat([X, torch.eye(64, dtype=torch.float64)])  # every token once beforehand
    expected = everything.T @ everything / len(everything)
    torch.testing.assert_close(torch.diag(found["gram"].G), expected)
    torch.testing.assert_close(found["gram"].mean, everything.mean(0))
    torch.testing.assert_close(found["moments"].rms.square(), expected.diagonal())


def test_frequent_tokens_are_kept_better():
    model, plain = make("llama"), make("llama")
    E = weight_of(model.get_input_embeddings()).clone()
    frequent = torch.bincount(torch.tensor(tokenizer()(text()).input_ids), minlength=64).topk(8).indices
    corank.compress(model, "svd-llm", keep=0.4, targets=["embed"], tokenizer=tokenizer(), **DATA)
    corank.compress(plain, "svd", keep=0.4, targets=["embed"])
    errors = [
        float((E - m.get_input_embeddings().dense_weight())[:, frequent].norm() / E[:, frequent].norm())
        for m in (model, plain)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(
    ("name", "method", "settings", "match"),
    [
        ("t5", "svd", dict(targets=["lm_head"]), "lm_head shares its weight .* leave it dense"),
        ("whisper", "svd", dict(targets=["embed"]), "embed_tokens shares its weight .* leave it dense"),
        ("llama", "svd-llm", dict(targets=["lm_head"], target="anchored"), "lm_head lies outside the blocks"),
        ("llama", "svd-llm", dict(targets=["embed"], refit=True), "embed_tokens lies outside the blocks"),
        ("llama", "lord", dict(targets=["embed"]), "embed_tokens is an embedding, which has no bias"),
        ("llama", "fwsvd", dict(targets=["lm_head"]), "'fisher', which needs a backward pass"),
        ("llama", "col-id", dict(targets=["embed"]), "form 'embedding', which is stored as two plain factors"),
        ("llama-tied", "curing", dict(targets=["lm_head"]), "part of a tied pair"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(name, method, settings, match):
    model = make(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CorankError, match=match) as caught:
        corank.compress(model, method, keep=0.7, tokenizer=tokenizer(), **settings, **DATA)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_tied_embedding_is_not_loaded_without_its_head(tmp_path):
    model = make("llama-tied")
    corank.compress(model, "svd", keep=0.6, targets=["embed"], out=tmp_path / "out")
    import transformers

    with pytest.raises(CorankError, match="reads its rows from 'lm_head', which this class does not have"):
        transformers.AutoModel.from_pretrained(tmp_path / "out")


def test_one_pair_is_trained_and_both_ends_see_it():
    model = make("llama-tied")
    corank.compress(model, "svd", keep=0.6, targets=["embed"])
    head, embedding = model.lm_head, model.get_input_embeddings()
    ids = inputs("llama-tied")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert head.up.weight.grad is not None and head.down.weight.grad is not None
    with torch.no_grad():
        head.up.weight[5] = 0
    assert not embedding(torch.tensor([5])).any()
