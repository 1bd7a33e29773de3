"""A probe against the whole model with a layer exchanged by hand; and that nothing but the answer is left of it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from jobs import DATA, TEXT, job_for, measured

import corank
from corank.engine import gradients
from corank.errors import CorankError
from corank.model import Calibration, ResidentModel, StreamedModel, Text
from corank.order import Order
from corank.probing import probe
from corank.probing.probe import Effect, Prober
from tiny import SIZES, saved, text, tiny, tokenizer


def effect_by_hand(dense, changed, data: Calibration) -> Effect:
    """Straight from the definition, by two ordinary forward passes."""
    with torch.no_grad():
        p = torch.log_softmax(dense(input_ids=data.ids).logits.double(), -1)
        q = torch.log_softmax(changed(input_ids=data.ids).logits.double(), -1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    nll = [-x[:, :-1].gather(-1, data.ids[:, 1:, None]).mean() for x in (p, q)]
    return Effect(float(kl), float(nll[1] - nll[0]))


def changed_by_hand(model, job, store, change):
    """A copy of the model whose matrices have been truncated by hand, as dense matrices."""
    other = copy.deepcopy(model)
    for site in job.sites:
        if site.name in change:
            measured_ = probe.results_of(job, store, site.layer, None)(site, {})
            layer = other.get_submodule(site.name)
            conv = type(layer).__name__ == "Conv1D"
            W = (layer.weight.T if conv else layer.weight).detach()
            geometry = job.recipe.geometry(measured_)
            generator = torch.Generator().manual_seed(0)
            factors = job.recipe.factorize.factorize(W, geometry, change[site.name], generator).factors
            with torch.no_grad():
                layer.weight.copy_(factors.dense().T if conv else factors.dense())
    return other


@pytest.mark.parametrize("method", ["svd-llm", "kfac-svd", "col-id"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d", "qwen2-bias"])
def test_a_probe_is_a_forward_pass_of_the_changed_model(name, method, tmp_path):
    model = tiny(name, dtype=torch.float64)
    job = job_for(model, tmp_path, method, allocate="lems", pack=method != "col-id")
    store, _ = measured(job)
    first, last = job.sites[1].name, job.sites[-1].name
    middle = next(s.name for s in job.sites if s.layer == 1 and s.role in ("down", "up"))
    changes = [{last: 2}, {first: 3}, {middle: 5}, {first: 1, middle: 4, last: 2}, {}]
    found = Prober(job, store).effects(changes)
    for change, effect in zip(changes, found, strict=True):
        wanted = effect_by_hand(model, changed_by_hand(model, job, store, change), job.heldout)
        assert effect.kl == pytest.approx(wanted.kl, rel=1e-8, abs=1e-12)
        assert effect.rise == pytest.approx(wanted.rise, rel=1e-8, abs=1e-12)
    assert found[-1] == Effect(0.0, 0.0)
    assert min(e.kl for e in found[:-1]) > 1e-6


def test_an_expert_is_probed_on_the_tokens_it_is_given(tmp_path):
    torch.manual_seed(0)
    experts = dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=20, num_key_value_heads=2)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **experts)).eval()  # grouped products know no float64
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8.0 if p.ndim > 1 else 1.0)
    job = job_for(model, tmp_path, "svd", allocate="lems", targets="*.mlp.experts.2.down")
    store, _ = measured(job)
    site = job.sites[1]
    other = copy.deepcopy(model)
    stack = other.get_submodule(site.name.rsplit(".", 2)[0]).down_proj
    with torch.no_grad():
        U, s, Vt = torch.linalg.svd(stack[2], full_matrices=False)
        stack[2] = U[:, :3] * s[:3] @ Vt[:3]
    found = Prober(job, store).effects([{site.name: 3}])[0]
    assert found.kl == pytest.approx(effect_by_hand(model, other, job.heldout).kl, rel=1e-3)
    assert found.kl > 1e-4
    assert type(model.get_submodule(site.name.rsplit(".", 2)[0])).__name__ == "MixtralExperts"  # as it was


@pytest.mark.parametrize("mixed", [False, True])
def test_the_windows_were_not_calibrated_on(mixed, tmp_path):
    texts = [Text(text(6000, seed), f"words {seed}") for seed in (1, 2)]
    order = Order.take(
        "svd", {"keep": 0.7}, None, dict(allocate="lems", probe_windows=5), texts if mixed else TEXT, **DATA
    )
    job = order.job(ResidentModel(tiny("llama-gqa")), tokenizer(), None, torch.float32)
    assert len(job.heldout.ids) == 5 and len(job.data.ids) == 8
    seen = {tuple(w) for w in job.data.ids.tolist()}
    assert not seen & {tuple(w) for w in job.heldout.ids.tolist()}
    if mixed:  # of both texts
        ids = [tokenizer()(t.text)["input_ids"] for t in texts]
        windows = [{tuple(x[i : i + 16]) for i in range(0, len(x) - 15, 16)} for x in ids]
        assert all(any(tuple(w) in of_one for w in job.heldout.ids.tolist()) for of_one in windows)


def test_a_text_without_further_windows_lends_some_of_them():
    windows = len(tokenizer()(TEXT.text)["input_ids"]) // 16
    settings = {**DATA, "samples": windows}
    order = Order.take("svd-llm", {"keep": 0.7}, None, {"allocate": "lems"}, TEXT, **settings)
    job = order.job(ResidentModel(tiny("llama-gqa")), tokenizer(), None, torch.float32)
    assert torch.equal(job.heldout.ids, job.data.ids[:: windows // 4][:4])


def test_nothing_of_the_model_changes(tmp_path):
    model = tiny("qwen2-bias")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = dict(model.named_modules())
    pointers = {k: v.data_ptr() for k, v in model.state_dict().items()}
    job = job_for(model, tmp_path, allocate="lems")
    store, _ = measured(job)
    Prober(job, store).effects([{s.name: 2} for s in job.sites] + [{s.name: 1 for s in job.sites}])
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert {k: v.data_ptr() for k, v in after.items()} == pointers
    assert all(model.get_submodule(k) is v for k, v in modules.items() if k)


def test_a_failure_puts_the_layers_back(tmp_path, monkeypatch):
    model = tiny("llama-gqa")
    modules = dict(model.named_modules())
    job = job_for(model, tmp_path, allocate="lems")
    store, _ = measured(job)

    def fail(*_args, **_kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(probe.Stream, "run", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        Prober(job, store).effects([{job.sites[0].name: 2}])
    assert all(model.get_submodule(k) is v for k, v in modules.items() if k)
    assert not (tmp_path / "probes.json").exists()


@pytest.mark.parametrize("room", [1, 2, 5])
def test_rounds_do_not_matter(room, tmp_path, monkeypatch):
    """Branches that do not fit in memory together go through the blocks in several rounds: the same bits."""
    model = tiny("llama-gqa")
    job = job_for(model, tmp_path, allocate="lems")
    store, _ = measured(job)
    changes = [{s.name: rank} for s in job.sites for rank in (1, 4)] + [{s.name: 3 for s in job.sites}]
    whole = Prober(job, store).effects(changes)
    (tmp_path / "probes.json").unlink()
    monkeypatch.setattr(probe, "ACTIVATION_BYTES", room * 4 * 16 * 24 * 4)
    assert Prober(job, store).effects(changes) == whole
    assert gradients.ACTIVATION_BYTES > 1e9


def test_streamed_probes_are_the_same_and_cost_only_the_blocks_behind(tmp_path, monkeypatch):
    folder = saved("llama-gqa", tmp_path / "dense")
    source = StreamedModel(folder)
    job = job_for(None, tmp_path / "streamed", allocate="lems", source=source)
    store, _ = measured(job)
    changes = [{s.name: 2} for s in job.sites]
    resident = job_for(tiny("llama-gqa"), tmp_path / "resident", allocate="lems")
    wanted = Prober(resident, measured(resident)[0]).effects(changes)
    in_memory, runs = [], []
    run = probe.Stream.run

    def counted(self, module, layer, i, hidden=None):
        blocks = source.model.get_submodule(source.outline.blocks)
        in_memory.append(sum(p.numel() for p in blocks.parameters() if not p.is_meta))
        runs.append(layer)
        return run(self, module, layer, i, hidden)

    monkeypatch.setattr(probe.Stream, "run", counted)
    found = Prober(job, store).effects(changes)
    assert [e.kl for e in found] == pytest.approx([e.kl for e in wanted], rel=1e-4, abs=1e-7)
    one_block = sum(p.numel() for p in source.model.get_submodule(f"{source.outline.blocks}.0").parameters())
    assert max(in_memory) == one_block  # never a second one
    batches = -(-len(job.heldout.ids) // job.batch)
    here = [sum(s.layer == layer for s in job.sites) for layer in range(3)]
    behind = [sum(here[: layer + 1]) for layer in range(3)]
    assert [runs.count(layer) for layer in range(3)] == [batches * (n + 1) for n in behind]  # and the dense model once


def test_what_was_measured_is_not_measured_again(tmp_path):
    model = tiny("llama-gqa")
    job = job_for(model, tmp_path, allocate="lems")
    store, _ = measured(job)
    changes = [{s.name: 2} for s in job.sites]
    first = Prober(job, store)
    found = first.effects(changes)
    assert first.probes == len(changes)
    assert first.effects(changes) == found and first.probes == len(changes)
    later = Prober(job_for(model, tmp_path, keep=0.5, allocate="lems"), store)  # another budget, another process
    assert later.effects(changes) == found and later.probes == 0
    later.effects([{job.sites[0].name: 3}, *changes])
    assert later.probes == 1
    other = Prober(job_for(model, tmp_path, allocate="lems", probe_windows=3), store)
    other.effects(changes[:2])
    assert other.probes == 2  # other windows are another question


def test_what_cannot_be_probed_is_explained(tmp_path):
    with pytest.raises(CorankError, match="lm_head lies outside; leave it out .ignore=lm_head. or use"):
        corank.compress(
            tiny("llama-gqa"), "svd-llm", keep=0.7, data=TEXT, tokenizer=tokenizer(), allocate="lems",
            targets=("q", "lm_head"), **DATA,
        )  # fmt: skip
    model = tiny("llama-gqa")
    with pytest.raises(CorankError, match="compares predictions of text"):
        examples = [{"input_ids": torch.randint(3, 60, (2, 16))}]
        corank.compress(model, "svd-llm", keep=0.7, data=examples, allocate="lems")
