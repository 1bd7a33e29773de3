"""CURing's own invariants: what it counts, which layers it takes, its rank rule, its importance and its link."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf

import corank
from corank import recipe
from corank.engine.site import cost
from corank.factors import KINDS, weight_of
from corank.linalg import select
from corank.methods.weights.curing import break_even, least_turning
from corank.model import Text, outline
from corank.recipe import RankChoice
from tiny import text, tiny, tokenizer

DATA = dict(data=Text(text(), "words"), samples=6, length=16, batch=4)

# the order in which the paper's repository finds the layers of Llama-3.1-8B to turn their input least
PAPER_ORDER = (25, 26, 27, 24, 28, 23, 22, 29, 20, 21, 19, 18, 17, 30, 16, 11, 10, 13, 14, 15)


def llama_8b():
    return tf.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def case(sites, distances, limit=None, made=None):
    made = made or recipe.get("curing").recipe()
    return RankChoice(sites, distances, limit, lambda s, r: cost(made, s, r), lambda s: None)


def test_llama_3_1_8b_at_the_papers_setting_has_7_316_574_208_parameters():
    plan = outline(llama_8b())
    assert plan.parameters == 8_030_261_248
    distances = [1.0] * 32
    for place, layer in enumerate(PAPER_ORDER):
        distances[layer] = place / 100
    made = recipe.get("curing").recipe(layers=10, rank=256)
    ranks = made.rule(case(list(plan.sites), distances, made=made))
    assert {int(n.split(".")[2]) for n in ranks} == set(PAPER_ORDER[:10])
    assert {n.rsplit(".", 1)[1] for n in ranks} == {"q_proj", "k_proj", "gate_proj"} and set(ranks.values()) == {256}
    sites = {s.name: s for s in plan.sites}
    saved = sum(sites[n].numel - KINDS["cur"][0].count(*sites[n].shape, r) for n, r in ranks.items())
    assert plan.parameters - saved == 7_316_574_208


def test_the_default_rank_is_the_papers_at_the_papers_width():
    plan = outline(llama_8b())
    made = recipe.get("curing").recipe()
    assert set(made.rule(case(list(plan.sites), [0.5] * 32, made=made)).values()) == {256}


@pytest.mark.parametrize("shape,expected", [((4096, 4096), 1696), ((1024, 4096), 718), ((14336, 4096), 2769)])
def test_break_even_ranks_of_the_sheet(shape, expected):
    m, n = shape
    r = break_even(m, n)
    assert r == expected
    assert r * (m + n) + r * r <= m * n < (r + 1) * (m + n) + (r + 1) ** 2


def test_the_first_and_last_layers_are_never_touched():
    assert least_turning([0.0, 0.3, 0.1, 0.2, 0.0]) == [2, 3, 1]


def test_layers_are_chosen_by_the_angle_of_the_last_token():
    model, dense = tiny("llama-gqa"), tiny("llama-gqa")
    report = corank.compress(model, "curing", layers=1, rank=3, tokenizer=tokenizer(), **DATA)
    from corank.model import calibration

    ids = calibration(tokenizer(), DATA["data"], 6, 16, 0).ids
    with torch.no_grad():
        hidden = dense(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    # the last entry of hidden_states has passed the final norm: only inner layers can be compared
    for layer in range(2):
        a, b = hidden[layer][:, -1].double(), hidden[layer + 1][:, -1].double()
        angle = torch.arccos(torch.cosine_similarity(a, b).clamp(-1, 1)).mean() / math.pi
        assert report.extra["angular_distances"][layer] == pytest.approx(float(angle), abs=1e-6)
    assert {r["layer"] for r in report.sites if r["kind"] == "cur"} == {1}


def test_columns_and_rows_are_entries_of_the_weight_and_come_from_importance():
    model, dense = tiny("llama-gqa"), tiny("llama-gqa")
    corank.compress(model, "curing", layers=1, rank=4, tokenizer=tokenizer(), **DATA)
    from corank.engine.stream import Stream
    from corank.model import ResidentModel, calibration

    source = ResidentModel(dense)
    stream = Stream(source, calibration(tokenizer(), DATA["data"], 6, 16, 0), 6)
    inputs = []
    with torch.no_grad():
        stream.set_hidden(0, [stream.run(dense.model.layers[0], 0, 0)])
    stream.observe(dense.model.layers[1], 1, 0, {"mlp.gate_proj": lambda x, _m: inputs.append(x)})
    a = inputs[0].flatten(0, 1).double().square().mean(0).sqrt()
    name = "model.layers.1.mlp.gate_proj"
    W = weight_of(dense.get_submodule(name)).double()
    P, _, Vt = torch.linalg.svd(W.abs() * a, full_matrices=False)
    J = select(W, 4, "deim", axis=1, basis=Vt[:4].T)
    I = select(W, 4, "deim", axis=0, basis=P[:, :4])
    found = model.get_submodule(name).factors()
    assert torch.equal(found.C.double(), W[:, J]) and torch.equal(found.R.double(), W[I])
    M = torch.linalg.pinv(W[:, J]) @ W @ torch.linalg.pinv(W[I])
    torch.testing.assert_close(found.M.double(), M, rtol=1e-3, atol=1e-4)


def test_only_the_link_trains():
    model = tiny("llama-gqa")
    corank.compress(model, "curing", layers=1, rank=4, tokenizer=tokenizer(), **DATA)
    layer = model.model.layers[1].self_attn.q_proj
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"link.weight"}


def test_with_a_budget_as_few_layers_as_meet_it_are_taken():
    plan = outline(llama_8b())
    dense = sum(s.numel for s in plan.sites)
    distances = [1.0 - i / 100 for i in range(32)]
    one = 71_368_704  # what one layer saves at rank 256
    made = recipe.get("curing").recipe()
    for layers in (1, 3):
        ranks = made.rule(case(list(plan.sites), distances, dense - layers * one, made))
        assert len(ranks) == 3 * layers
        ranks = made.rule(case(list(plan.sites), distances, dense - layers * one - 1, made))
        assert len(ranks) == 3 * (layers + 1)


def test_a_budget_below_what_its_roles_can_give_is_refused_with_the_smallest_size():
    plan = outline(llama_8b())
    made = recipe.get("curing").recipe()
    with pytest.raises(corank.CorankError, match="no less than 0.6"):
        made.rule(case(list(plan.sites), [0.5] * 32, 1000, made))


@pytest.mark.parametrize("selector", ["deim", "curing-v1", "curing-v2", "qdeim", "leverage"])
def test_every_selector_can_be_chosen(selector):
    model = tiny("llama-gqa")
    report = corank.compress(model, "curing", layers=1, rank=3, selector=selector, tokenizer=tokenizer(), **DATA)
    assert any(r["kind"] == "cur" for r in report.sites)


def test_v2_takes_the_smallest_rank_that_holds_the_energy():
    made = recipe.get("curing-v2").recipe(layers=1, energy=0.5, min_rank=1, multiple=1)
    model = tiny("llama-gqa")
    sites = list(outline(model.config).sites)
    ones = torch.ones(24, dtype=torch.float64)

    def load(site):
        from corank.factorize import Measured
        from corank.statistics import Moments

        return weight_of(model.get_submodule(site.name)), Measured(
            {"moments": Moments(ones[:1].expand(site.shape[1]), ones, ones, 1)}
        )

    ranks = made.rule(RankChoice(sites, [0.5] * 3, None, lambda s, r: cost(made, s, r), load))
    assert ranks
    for name, r in ranks.items():
        sigma2 = torch.linalg.svdvals(weight_of(model.get_submodule(name)).double()).square()
        share = sigma2.cumsum(0) / sigma2.sum()
        top = break_even(*weight_of(model.get_submodule(name)).shape)
        assert r == top or (share[r - 1] >= 0.5 and (r == 1 or share[r - 2] < 0.5))
