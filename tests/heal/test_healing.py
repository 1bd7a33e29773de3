"""Healing: exact losses, only the declared parameters change, never worse on held-out text, interrupted runs go on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import corank
from corank import healing
from corank.errors import CorankError
from corank.factors import FactorizedLinear
from corank.factors.shared import SharedLowRankLinear
from corank.heal import Schedule, train
from corank.heal.distillation import lumped_kl, predictions
from corank.heal.parameters import trainable
from corank.heal.training import divide, fit
from corank.healing import heal
from corank.model import ResidentModel, Text
from tiny import saved, text, tiny, tokenizer, windows

TEXT = Text(text(), "words")


def distributions(tokens=7, vocabulary=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    teacher = (3 * torch.randn(tokens, vocabulary, generator=g)).log_softmax(-1)
    return teacher, torch.randn(tokens, vocabulary, generator=g)


def lumped(teacher, k):
    values, places = teacher.topk(k, -1)
    return places, values, teacher.scatter(-1, places, -math.inf).logsumexp(-1)


def test_with_all_tokens_it_is_the_divergence():
    teacher, logits = distributions()
    exact = (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(lumped_kl(logits, *lumped(teacher, 40)), exact)


def test_lumping_tokens_loses_divergence_and_more_tokens_lose_less():
    teacher, logits = distributions()
    values = [lumped_kl(logits, *lumped(teacher, k)) for k in (1, 5, 20, 39, 40)]
    assert all((a <= b + 1e-6).all() and (a >= 0).all() for a, b in zip(values, values[1:], strict=False))
    torch.testing.assert_close(values[-2], values[-1])  # a single token left over is not lumped with anything


def test_the_gradient_vanishes_at_the_teacher():
    teacher, _ = distributions()
    logits = (teacher + 2.5).requires_grad_()
    value = lumped_kl(logits, *lumped(teacher, 6)).sum()
    (g,) = torch.autograd.grad(value, logits)
    assert abs(value.item()) < 1e-5 and float(g.abs().max()) < 1e-6


def test_the_gradient_is_that_of_finite_differences():
    teacher, logits = distributions(tokens=2, vocabulary=9)
    chosen = [t.double() if t.is_floating_point() else t for t in lumped(teacher, 4)]

    def value(x):  # the loss computes in float32 inside models; the check needs float64
        log_q = x.log_softmax(-1)
        rest = log_q.scatter(-1, chosen[0], -math.inf).logsumexp(-1)
        mine = (chosen[1].exp() * (chosen[1] - log_q.gather(-1, chosen[0]))).sum(-1)
        return (mine + chosen[2].exp() * (chosen[2] - rest)).sum()

    x = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(value, x)
    torch.testing.assert_close(
        torch.autograd.grad(lumped_kl(x.float(), *lumped(teacher, 4)).sum(), x)[0],
        torch.autograd.grad(value(x), x)[0],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("padded", [False, True])
def test_predictions_are_those_of_the_model(padded):
    model, data = tiny("llama-gqa"), windows(padded=padded)
    found = predictions(ResidentModel(model), data, top=64, batch=4)
    mask = None if data.mask is None else data.mask.long()
    with torch.no_grad():
        logits = model(input_ids=data.ids, attention_mask=mask).logits
    real = torch.ones_like(data.ids, dtype=torch.bool) if data.mask is None else data.mask
    exact = logits.log_softmax(-1).gather(-1, found.indices.long())
    torch.testing.assert_close(found.log_p[real], exact[real], rtol=1e-4, atol=1e-5)
    assert abs(float(found.divergence(logits, list(range(6))))) < 1e-5


def quadratic(start=3.0):
    p = nn.Parameter(torch.full((4,), start))
    return {"p": p}, lambda which: ((p - torch.tensor([float(i) for i in which]).mean()) ** 2).mean()


def test_no_steps_are_the_identity():
    parameters, loss = quadratic()
    before = parameters["p"].detach().clone()
    history = fit(parameters, loss, [0, 1], [0], Schedule(epochs=0))
    assert torch.equal(parameters["p"], before) and history.steps == [0]


def test_training_never_ends_worse_on_what_is_held_out():
    parameters, loss = quadratic(start=-5.0)
    before = parameters["p"].detach().clone()
    # what is learned leads away from what is held out
    history = fit(parameters, loss, [100, 200], [-5], Schedule(epochs=20, learning_rate=0.1))
    assert len(history.heldout) > 2 and max(history.heldout) > history.heldout[0]
    assert torch.equal(parameters["p"], before)


def test_the_best_state_is_kept():
    parameters, loss = quadratic()
    history = fit(parameters, loss, [0], [0], Schedule(epochs=60, learning_rate=0.1, batch=1))
    assert history.best < 0.1 * history.heldout[0]
    assert loss([0]).item() == pytest.approx(history.best)


def test_an_interrupted_training_ends_in_the_same_bits(tmp_path):
    def once(state, steps=None):
        parameters, loss = quadratic()
        calls = []

        def counted(which):
            if torch.is_grad_enabled():
                calls.append(list(which))
                if steps is not None and len(calls) > steps:
                    raise KeyboardInterrupt
            return loss(which)

        schedule = Schedule(epochs=6, learning_rate=0.05, batch=1, checks=2)
        return fit(parameters, counted, [0, 1, 2, 3], [1], schedule, state=state), parameters["p"], calls

    whole, result, order = once(None)
    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "state.pt", steps=11)
    history, resumed, rest = once(tmp_path / "state.pt")
    assert torch.equal(result, resumed) and history.heldout == whole.heldout
    assert rest == order[10:]  # the last look at the held-out sequences was after ten steps


def test_sequences_are_divided_evenly():
    train, held = divide(64)
    assert len(held) == 6 and sorted(train + held) == list(range(64))
    assert divide(2) == ([0], [1])
    with pytest.raises(CorankError, match="two sequences"):
        divide(1)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healing")
    dense = saved("llama-gqa", folder / "dense")
    corank.compress(dense, "svd-llm", keep=0.5, out=folder / "small", data=TEXT, samples=6, length=16, pack=True)
    return dense, folder / "small"


SMALL = dict(data=TEXT, samples=10, length=16, schedule=Schedule(epochs=3, learning_rate=3e-3, batch=2))


@pytest.mark.parametrize("how", ["block", "kd"])
def test_healing_a_directory(compressed, how, tmp_path):
    dense, small = compressed
    before, words = corank.load(small)
    healed = heal(small, how=how, out=tmp_path / "healed", **SMALL)
    after, _ = corank.load(tmp_path / "healed")
    assert healed.after < healed.before
    corank.checkpoint.verify(tmp_path / "healed")
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()  # nothing grew
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    blocks = {n for n, p in before.named_parameters() if ".layers." in n}
    assert changed and changed <= blocks
    log = json.loads((tmp_path / "healed" / "healing.json").read_text())
    assert log["after"] == healed.after and not (tmp_path / "healed.healing").exists()


def test_distillation_brings_the_predictions_nearer(compressed, tmp_path):
    dense, small = compressed
    heal(small, out=tmp_path / "healed", **SMALL)
    data = windows(seed=5)
    taught = predictions(ResidentModel(corank.load(dense)[0]), data, top=64)
    rows = list(range(6))
    with torch.no_grad():
        losses = [
            float(taught.divergence(corank.load(d)[0](input_ids=data.ids).logits, rows))
            for d in (small, tmp_path / "healed")
        ]
    assert losses[1] < losses[0]


def test_only_the_factors_the_norms_and_the_biases(compressed):
    model, _ = corank.load(compressed[1])
    block = model.model.layers[0]
    inside = trainable(block, "factors")
    owners = {n for n, m in block.named_modules() if isinstance(m, FactorizedLinear)}
    assert owners and set(inside) <= set(trainable(block, "blocks"))
    for name, p in block.named_parameters():
        assert (name in inside) == (p.dim() == 1 or any(name.startswith(o + ".") for o in owners))


def test_a_block_that_is_right_already_is_left_alone():
    model = tiny("llama-gqa")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    same = tiny("llama-gqa")
    healed = train(ResidentModel(same), ResidentModel(model), windows(), "block", schedule=Schedule(epochs=1))
    assert healed.after < 1e-10
    assert all(torch.equal(p, before[n]) for n, p in same.named_parameters())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Neighbouring layers read one basis, which the first of them holds."""
    folder = tmp_path_factory.mktemp("shared")
    dense = saved("llama-gqa", folder / "dense")
    corank.compress(dense, "basis-sharing", keep=0.6, out=folder / "small", data=TEXT, samples=6, length=16)
    return folder / "small"


def test_a_basis_that_later_blocks_read_is_left_alone_by_block(shared, tmp_path):
    heal(shared, how="block", out=tmp_path / "healed", **SMALL)
    before, after = (corank.load(d)[0] for d in (shared, tmp_path / "healed"))
    followers = [m for m in before.modules() if isinstance(m, SharedLowRankLinear)]
    bases = {m.basis for m in followers}
    assert bases
    for name in bases:
        assert torch.equal(before.get_submodule(name).down.weight, after.get_submodule(name).down.weight), name
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_an_interrupted_healing_goes_on(compressed, tmp_path, monkeypatch):
    _, small = compressed
    heal(small, how="block", out=tmp_path / "whole", **SMALL)

    class Stopped(Exception):
        pass

    def stop(what, done, of, value):
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        heal(small, how="block", out=tmp_path / "healed", progress=stop, **SMALL)
    assert not (tmp_path / "healed").exists()
    heal(small, how="block", out=tmp_path / "healed", **SMALL)
    whole, healed = (corank.load(tmp_path / d)[0].state_dict() for d in ("whole", "healed"))
    assert all(torch.equal(whole[n], healed[n]) for n in whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(how="magic"), "block"),
        (dict(what="everything"), "factors"),
        (dict(data="nowhere.txt"), "no text file"),
        (dict(teacher="other", how="block"), "another architecture"),
        (dict(samples=1), "two sequences"),
        (dict(tests=[TEXT]), "of the text to test with"),
        (dict(out=None), "out=DIRECTORY"),
    ],
)
def test_bad_input_leaves_nothing(compressed, arguments, words, tmp_path):
    _, small = compressed
    if arguments.get("teacher"):
        arguments = {**arguments, "teacher": saved("gpt2-conv1d", tmp_path / "other")}
    with pytest.raises(CorankError, match=words):
        heal(small, **{"out": tmp_path / "healed", **SMALL, **arguments})
    assert not (tmp_path / "healed").exists() and not (tmp_path / "healed.healing").exists()


@pytest.mark.parametrize("bad", [dict(epochs=-1), dict(minutes=0), dict(learning_rate=0), dict(batch=0)])
def test_a_schedule_out_of_range_is_refused(bad):
    with pytest.raises(CorankError):
        Schedule(**bad)


def test_a_model_in_memory(compressed):
    dense, small = compressed
    model, words = corank.load(small)
    teacher, _ = corank.load(dense)
    flags = [p.requires_grad for p in model.parameters()]
    healed = heal(model, teacher, tokenizer=words, **SMALL)
    assert healed.after < healed.before and [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(CorankError, match="teacher"):
        heal(model, tokenizer=tokenizer(), **SMALL)


def test_compressing_with_healing_is_compressing_and_healing(tmp_path):
    dense = saved("llama-gqa", tmp_path / "dense")
    shared = dict(data=TEXT, samples=10, length=16, keep=0.6)
    report = corank.compress(dense, "svd-llm", out=tmp_path / "both", heal="kd", epochs=3, **shared)
    corank.compress(dense, "svd-llm", out=tmp_path / "first", **shared)
    healed = heal(
        tmp_path / "first", out=tmp_path / "second", data=TEXT, samples=10, length=16, schedule=Schedule(epochs=3)
    )
    one, other = (corank.load(tmp_path / d)[0].state_dict() for d in ("both", "second"))
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert report.extra["healing"][0]["after"] == healed.after
    assert report.parameters["heal"] == "kd" and not list(tmp_path.glob("*.unhealed"))


def test_an_interrupted_compression_with_healing_goes_on_from_the_closed_form(tmp_path, monkeypatch):
    dense = saved("llama-gqa", tmp_path / "dense")
    order = dict(data=TEXT, samples=10, length=16, keep=0.6, heal="block", epochs=1, out=tmp_path / "small")
    with monkeypatch.context() as patch:
        patch.setattr(healing, "train", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            corank.compress(dense, "svd-llm", **order)
    before = (tmp_path / "small.unhealed" / "config.json").stat().st_mtime_ns
    with pytest.raises(CorankError, match="another run"):
        corank.compress(dense, "svd-llm", **{**order, "keep": 0.5})
    assert (tmp_path / "small.unhealed" / "config.json").stat().st_mtime_ns == before
    corank.compress(dense, "svd-llm", **order)
    assert corank.load(tmp_path / "small") and not list(tmp_path.glob("*.unhealed"))


def test_healing_in_memory_is_refused_by_compress():
    with pytest.raises(CorankError, match="in memory"):
        corank.compress(tiny("llama-gqa"), "svd", keep=0.5, heal="kd", tokenizer=tokenizer())
