"""Experts: taken apart exactly, measured on the tokens routed to them, filled up from their layer, stored one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import inputs, logits, make

import corank
from corank import checkpoint
from corank.engine.drift import observe_drift
from corank.engine.forms import new_statistics
from corank.engine.job import Job
from corank.engine.measure import measure_block
from corank.engine.routed import ENOUGH, PRIOR, Pools, Sampler, filled
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factors import ExpertList, is_stack, put_together, stacked, take_apart
from corank.model import Calibration, ResidentModel, Text, outline
from corank.recipe import get
from corank.statistics import InputGram, InputMoments
from tiny import text, tokenizer, windows

MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe"]
TEXT = Text(text(), "words")
DATA = dict(data=TEXT, samples=4, length=12, batch=2)


@pytest.mark.parametrize("name", MIXTURES)
def test_taken_apart_and_put_together_a_model_computes_the_same(name):
    model = make(name, torch.float64)
    before, keys = logits(model, inputs(name)), set(model.state_dict())
    paths = take_apart(model)
    assert paths and not any(is_stack(m) for m in model.modules())
    torch.testing.assert_close(logits(model, inputs(name)), before, rtol=1e-12, atol=1e-12)
    for path in paths:  # the copy that is made of replaced experts
        torch.testing.assert_close(
            stacked(model.get_submodule(path)).gate_up_proj, model.get_submodule(path).stock.gate_up_proj
        )
    put_together(model)
    assert set(model.state_dict()) == keys and torch.equal(logits(model, inputs(name)), before)


def test_experts_that_are_left_dense_let_go_of_the_stack():
    model = make("mixtral")
    corank.compress(model, "svd", keep=0.6, targets=["*.experts.1.down"])
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, ExpertList) and all(p.is_meta for p in experts.stock.parameters())
    dense = experts.get_submodule("0").gate_up.weight
    assert dense.untyped_storage().nbytes() == dense.nbytes
    assert (
        sum(p.numel() for p in experts.parameters()) == model.config.num_local_experts * 3 * 24 * 20 - 24 * 20 + 6 * 44
    )


def job_for(model, recipe, data, **settings):
    source = ResidentModel(model)
    return Job(source, recipe, list(source.outline.sites), None, data, None, source.dtype, batch=2, **settings)


def routed_tokens(model, data):
    """Oracle: per layer and expert, the layer inputs of the real tokens that the router sends there."""
    found, layers = {}, model.model.layers

    def hook(layer):
        def see(_module, args, _out=None):
            hidden, index, _ = args
            real = torch.ones(len(hidden), dtype=torch.bool) if data.mask is None else data.mask.flatten()
            for e in range(4):
                rows = (index == e).any(dim=1) & real
                found[layer, e] = hidden[rows]

        return see

    handles = [
        b.mlp.experts.register_forward_pre_hook(hook(i)) for i, b in enumerate(layers) if hasattr(b.mlp, "experts")
    ]
    kwargs = {} if data.mask is None else {"attention_mask": data.mask.long()}
    with torch.no_grad():
        model(input_ids=data.ids, use_cache=False, **kwargs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_is_measured_on_the_tokens_routed_to_it(name, padded):
    model, data = make(name, torch.float64), windows(6, 10, padded=padded)
    wanted = routed_tokens(model, data)
    stock = {key: module for key, module in model.named_modules() if is_stack(module)}
    job = job_for(model, get("svd-llm").recipe(), data)
    stream = Stream(job.source, data, 2)
    for layer in range(job.layers):
        with job.source.block(layer) as block:
            table = measure_block(job, block, layer, stream, {"gram"})
        for site in (s for s in job.in_layer(layer) if s.pool):
            path, number, leaf = site.name.rsplit(".", 2)
            X, experts = wanted[layer, int(number)], stock[path]
            if leaf == "down":
                gate, up = (X @ experts.gate_up_proj[int(number)].T).chunk(2, dim=-1)
                X = experts.act_fn(gate) * up
            statistic = table[site.group]["gram"]
            assert statistic.count == len(X)
            if len(X):
                torch.testing.assert_close(statistic.result().G, X.T @ X / len(X), rtol=1e-9, atol=1e-11)


def test_too_few_tokens_are_filled_up_with_those_of_the_layer():
    """The metric of an expert is that of its own tokens and of as many of the layer's as are missing."""
    model, data = make("mixtral", torch.float64), windows(6, 10)
    wanted = routed_tokens(model, data)
    stock = model.model.layers[0].mlp.experts
    job = job_for(model, get("svd-llm").recipe(), data)
    stream = Stream(job.source, data, 2)
    with job.source.block(0) as block:
        table = measure_block(job, block, 0, stream, {"gram"})
    pools = Pools(table, job.in_layer(0))
    everything = torch.cat([wanted[0, e] for e in range(4)])
    seen_few = 0
    for site in (s for s in job.in_layer(0) if s.pool):
        number, leaf = site.name.split(".")[-2:]
        own, n = wanted[0, int(number)], site.shape[1]
        other = everything
        if leaf == "down":
            rows = stream_rows(model, data, per_batch=-(-ENOUGH * n // len(stream)))
            own, other = (inner(stock, int(number), x) for x in (own, rows))
        missing = max(ENOUGH * n - len(own), 0)
        seen_few += missing > 0
        expected = (own.T @ own + missing * (other.T @ other) / len(other)) / (len(own) + missing)
        result = pools.of(site)["gram"].result()
        assert result.count == len(own) + missing
        torch.testing.assert_close(result.G, expected, rtol=1e-9, atol=1e-11)
    assert seen_few == 8


def inner(stock, e, X):
    gate, up = (X @ stock.gate_up_proj[e].T).chunk(2, dim=-1)
    return stock.act_fn(gate) * up


def stream_rows(model, data, per_batch):
    """Evenly spaced rows of the first layer's experts' input in every batch of two windows."""
    rows = []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _m, args: rows.append(args[0]))
    with torch.no_grad():
        for i in range(0, len(data.ids), 2):
            model(input_ids=data.ids[i : i + 2], use_cache=False)
    handle.remove()
    return torch.cat([x[:: max(len(x) // per_batch, 1)][:per_batch] for x in rows])


@pytest.mark.parametrize("kind", [InputGram, InputMoments])
def test_filling_up_is_an_average_weighted_by_tokens(kind):
    g = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(t, 5, generator=g, dtype=torch.float64) for t in (7, 30))
    own, prior, both = kind(5), kind(5), kind(5)
    own.update(X)
    prior.update(Y)
    both.update(torch.cat([X, Y[:13].repeat(1, 1)]))
    assert filled(own, prior, 7) is own and filled(own, kind(5), 20) is own
    result = filled(own, prior, 20)
    state, mine, other = result.state(), own.state(), prior.state()
    assert result.count == 20 and own.count == 7
    for name in kind.axes:
        torch.testing.assert_close(state[name] / 20, (mine[name] + 13 * other[name] / 30) / 20)
    untouched = filled(kind(5), prior, 20)
    for name in kind.axes:
        torch.testing.assert_close(untouched.state()[name] / 20, prior.state()[name] / 30)


def test_a_sample_is_spread_over_the_real_tokens_of_every_batch():
    sampler = Sampler(rows=10, batches=3)
    x = torch.arange(40.0).view(2, 20, 1)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 4:] = False
    sampler(x, mask)
    assert sampler.latest.flatten().tolist() == [0, 6, 12, 18]
    sampler(x[:, :1], None)
    assert sampler.latest.flatten().tolist() == [0, 20]


def test_an_expert_that_is_never_chosen_is_compressed_by_what_its_layer_sees():
    model = make("mixtral")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[3] = block.mlp.gate.weight[0]  # on a tie the first is taken
            block.mlp.gate.weight[2] = -block.mlp.gate.weight[0]
            block.mlp.gate.weight[1] = 0
    report = corank.compress(model, "svd-llm", keep=0.6, tokenizer=tokenizer(), **DATA)
    rows = [r for r in report.sites if ".experts." in r["name"]]
    assert rows and all(r["loss"] == pytest.approx(r["predicted_loss"], abs=1e-4) and r["loss"] < 1 for r in rows)
    assert torch.isfinite(logits(model, inputs("mixtral"))).all()


def test_an_anchored_run_compares_the_same_tokens():
    """Before anything is compressed, what the two models show an expert is the same, token by token."""
    model, data = make("mixtral", torch.float64), windows(6, 10)
    job = job_for(model, get("svd-llm").recipe(target="anchored"), data)
    dense = Stream(job.source, data, 2)
    drifted = dense.copy()
    generator = torch.Generator().manual_seed(1)
    for layer, noise in ((0, 0.0), (0, 0.5)):
        drifted.hidden = [h + noise * torch.randn(h.shape, generator=generator, dtype=h.dtype) for h in dense.hidden]
        with job.source.block(layer) as block:
            for leaf in ("gate_up", "down"):
                leaders = {s.group: s for s in job.in_layer(layer) if s.pool and s.name.endswith(leaf)}
                seen, cross = observe_drift(job, block, block, layer, leaders, dense, drifted)
                for group, site in leaders.items():
                    both, drift = cross[group]["cross"], seen[group]["gram"]
                    assert both.count == drift.count
                    if both.count and not noise:
                        for moment in (both.result().C, both.result().H, drift.result().G):
                            torch.testing.assert_close(moment, both.result().G, rtol=1e-10, atol=1e-12)
                    if noise and both.count:
                        assert not torch.allclose(both.result().C, both.result().G)
                    assert (group + PRIOR in cross) == (leaf == "down") == (group + PRIOR in seen)
                    assert site.pool
    for mixture in (m for m in model.modules() if isinstance(m, ExpertList)):
        assert mixture.forced is None


@pytest.mark.parametrize(
    "settings",
    [
        dict(target="anchored"),
        dict(target="shifted"),
        dict(refit=True),
        dict(pack=True),
        dict(allocate="lagrange"),
        dict(targets=["expert"]),
    ],
    ids=str,
)
def test_every_way_of_compressing_works_on_experts(settings, tmp_path):
    model = make("qwen2-moe")
    report = corank.compress(
        model, "svd-llm", keep=0.7, tokenizer=tokenizer(), out=tmp_path / "out", **settings, **DATA
    )
    made = [r for r in report.sites if ".experts." in r["name"] and r["kind"] != "dense"]
    assert made and all(0 <= r["loss"] < 1 for r in made)
    if settings.get("targets"):
        assert {r["role"] for r in report.sites} == {"gate_up", "down"}
    loaded, _ = checkpoint.load(tmp_path / "out")
    stored, wanted = loaded.state_dict(), model.state_dict()
    assert stored.keys() == wanted.keys() and all(torch.equal(stored[k], wanted[k]) for k in stored)
    torch.testing.assert_close(logits(loaded, inputs("qwen2-moe")), logits(model, inputs("qwen2-moe")))


def test_operations_are_those_of_the_experts_that_run():
    plan = outline(make("mixtral").config)
    sites = [s for s in plan.sites if s.layer == 0]
    experts = [s for s in sites if s.pool]
    assert {s.share for s in experts} == {0.5} and {s.share for s in sites if not s.pool} == {1.0}
    attention = sum(2 * s.numel for s in sites if not s.pool)
    assert sum(s.flops for s in sites) == attention + 2 * 2 * (3 * 24 * 20)  # two of four experts
    assert plan.flops == 2 * sum(s.flops for s in sites) + 2 * 64 * 24


def test_the_routers_stay():
    model = make("mixtral")
    for name in ("gate", "router"):
        block = model.model.layers[0].mlp
        block.add_module(name, torch.nn.Linear(24, 4, bias=False))
    from corank.model.outline import _routers

    take_apart(model)
    assert _routers(model) == {"model.layers.0.mlp.gate", "model.layers.0.mlp.router"}


def test_gradients_do_not_reach_experts_yet():
    with pytest.raises(CorankError, match=r"'fisher', which needs a backward pass .*experts.0.gate_up"):
        corank.compress(make("mixtral"), "fwsvd", keep=0.7, tokenizer=tokenizer(), **DATA)
    report = corank.compress(
        make("mixtral"), "fwsvd", keep=0.7, ignore=["expert"], tokenizer=tokenizer(), **{**DATA, "samples": 2}
    )
    assert {r["role"] for r in report.sites} == {"q", "k", "v", "o"}


def test_statistics_of_a_site_are_its_own():
    site = outline(make("mixtral").config).sites[0]
    assert new_statistics({"gram", "angular"}, site).keys() == {"gram"}
    assert dataclasses.replace(site, form="embedding").flops == 0
    assert Calibration(torch.zeros(3, 4, dtype=torch.long), None, {}).batches(2)[1]["input_ids"].shape == (1, 4)
