"""Pruned first, then factorized: on a language model, and on tiny random encoders of speech with synthetic tones."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf

import corank
from corank.engine.job import Job
from corank.errors import CorankError
from corank.factors import LowRankLinear, weight_of
from corank.model import Calibration, Examples, ResidentModel, Text
from corank.recipe import get
from corank.training.movement import MovementPruning
from corank.training.sparse_rank import SparseRank, directions, select, task_loss
from tiny import saved, text, tiny, tokenizer, windows

METHOD = "speech-prune-svd"
DATA = dict(data=Text(text(), "words"), samples=6, length=16, batch=2)


def tones(samples, length=400, seed=0):
    """Sums of three sines of random pitch, as raw sound [samples, length]."""
    g = torch.Generator().manual_seed(seed)
    pitch = 0.02 + 0.3 * torch.rand(samples, 3, 1, generator=g)
    return torch.sin(pitch * torch.arange(length)).mean(1)


def wav2vec2(head="Wav2Vec2Model", dtype=torch.float32):
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, vocab_size=16)
    front = dict(conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2)
    place = dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, apply_spec_augment=False)
    model = getattr(tf, head)(tf.Wav2Vec2Config(**sizes, **front, **place, pad_token_id=0)).eval()
    return model.to(dtype)


def whisper_encoder():
    """A Whisper encoder with a classifier behind it, which reads log-mel features."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64, d_model=24, num_mel_bins=8, max_source_positions=16, encoder_layers=2, encoder_ffn_dim=37
    )
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, decoder_layers=1, decoder_ffn_dim=8)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return tf.WhisperForAudioClassification(tf.WhisperConfig(**sizes, **heads, **special, num_labels=3)).eval()


def sound(kind, count=4):
    if kind == "wav2vec2":
        return [{"input_values": tones(2, seed=i)} for i in range(count)]
    frames = [tones(2 * 8, 32, seed=i).view(2, 8, 32) for i in range(count)]
    return [{"input_features": f, "labels": torch.tensor([0, 2])} for f in frames]


def job_of(model, keep=0.7, steps=8, **settings):
    source = ResidentModel(model)
    recipe = get(METHOD).recipe(steps=steps, **settings)
    sites = list(source.outline.sites)
    limit = int(keep * sum(s.numel for s in sites))
    return Job(source, recipe, sites, limit, windows(6, 12), None, torch.float64, batch=2)


def outputs(model, given):
    with torch.no_grad():
        out = model(**{k: v for k, v in given.items() if k != "labels"})
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("by", ["magnitude", "first-order"])
def test_the_share_of_weights_that_was_asked_for_is_left(by):
    model = tiny("llama-gqa", dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    job = job_of(model)
    data, loss = task_loss(job.source, job.data)
    sites = job.sites[:3]
    SparseRank(0.3, by, nuclear=0.0, rate=1e-15).prune(job, sites, data, loss, 4, None, None)
    for site in sites:
        layer = model.get_submodule(site.name)
        assert type(layer) is torch.nn.Linear and layer.weight.requires_grad
        mask, W = layer.weight != 0, before[f"{site.name}.weight"]
        assert int(mask.sum()) == round(0.3 * W.numel())
        torch.testing.assert_close(layer.weight.detach(), W * mask, rtol=1e-12, atol=1e-12)
        if by == "magnitude":
            assert float(W[mask].abs().min()) >= float(W[~mask].abs().max())
    others = [n for n in before if not any(n.startswith(s.name) for s in sites)]
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in others)


def test_pruning_goes_on_from_its_state():
    model = tiny("llama-gqa")
    name = "model.layers.0.mlp.up_proj"
    pruning = MovementPruning(model, [name], 0.5, steps=4)
    for t in range(2):
        model(input_ids=windows().ids[:2], labels=windows().ids[:2]).loss.backward()
        pruning.step(t + 1)
    other = MovementPruning(tiny("llama-gqa"), [name], 0.5, steps=4)
    other.restore(pruning.state())
    first, second = pruning.finish()[name], other.finish()[name]
    assert torch.equal(first.mask, second.mask) and torch.equal(first.scores, second.scores)


def test_the_nuclear_norm_is_made_smaller():
    """Without any other loss, and next to none: the sums of singular values fall, the larger eta the more."""
    sums = []
    for eta in (1e-9, 1.0):
        model = tiny("llama-gqa", dtype=torch.float64)
        job = job_of(model, steps=12)
        data, loss = task_loss(job.source, job.data)
        sites = job.sites[:8]
        SparseRank(1.0, nuclear=eta, rate=1e-2).prune(
            job, sites, data, lambda which, loss=loss: 0.0 * loss(which), 8, None, None
        )
        sums.append(sum(float(torch.linalg.svdvals(model.get_submodule(s.name).weight.detach()).sum()) for s in sites))
    assert sums[1] < 0.99 * sums[0]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d"])
def test_all_directions_are_the_matrix_and_cost_no_more_than_it(name):
    model = tiny(name, dtype=torch.float64)
    job = job_of(model)
    for site in job.sites[:4]:
        place = directions(model, site)
        W = weight_of(model.get_submodule(site.name))
        torch.testing.assert_close(place.up @ place.down, W, rtol=1e-10, atol=1e-10)
        m, n = W.shape
        assert [place.cost(r) for r in (0, 1, min(m, n))] == [0, m + n, m * n]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d"])
@pytest.mark.parametrize("keep", [0.35, 0.8])
def test_what_is_left_is_the_chosen_directions_within_the_budget(name, keep):
    model = tiny(name, dtype=torch.float64)
    job = job_of(model, keep)
    before = {s.name: weight_of(model.get_submodule(s.name)).clone() for s in job.sites}
    places = [directions(model, site) for site in job.sites]
    data, loss = task_loss(job.source, job.data)
    ranks = select(job, places, data, loss, job.limit, 6)
    size = 0
    for place in places:
        W, r = weight_of(model.get_submodule(place.module)), ranks.get(place.name)
        m, n = W.shape
        size += m * n if r is None else r * (m + n)
        if r is None:
            assert torch.equal(W, before[place.name])
            continue
        assert r * (m + n) < m * n and int(torch.linalg.matrix_rank(W)) == r
        # the part of W in the directions that stay: U_k U_k^T W = W' as U is orthogonal
        U = torch.linalg.svd(W, full_matrices=False).U[:, :r]
        torch.testing.assert_close(U @ (U.T @ before[place.name]), W, rtol=1e-8, atol=1e-8)
    largest = max(sum(before[p.name].shape) for p in places)
    assert job.limit - 40 * largest <= size <= job.limit and ranks
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_without_labels_a_model_learns_what_it_put_out_and_with_them_its_own_loss():
    model = wav2vec2(dtype=torch.float64)
    source = ResidentModel(model, example=sound("wav2vec2")[0])
    data, loss = task_loss(source, Examples.of(sound("wav2vec2")).calibration())
    assert len(data.ids) == 4 and float(loss([0, 3])) == 0
    wanted = outputs(model, {"input_values": sound("wav2vec2")[1]["input_values"].double()})
    with torch.no_grad():
        model.encoder.layers[0].feed_forward.output_dense.weight.mul_(1.1)
        now = outputs(model, {"input_values": sound("wav2vec2")[1]["input_values"].double()})
        assert float(loss([1])) == pytest.approx(
            float((now - wanted).square().mean() / wanted.square().mean()), rel=1e-9
        )
    labelled = whisper_encoder()
    source = ResidentModel(labelled, example=sound("whisper")[0])
    _, loss = task_loss(source, Examples.of(sound("whisper")).calibration())
    with torch.no_grad():
        assert float(loss([2])) == pytest.approx(float(labelled(**sound("whisper")[2]).loss), rel=1e-6)
    causal = tiny("llama-gqa")
    data = windows(4, 8)
    assert task_loss(ResidentModel(causal), data)[0] is data
    masked = tiny("bert")  # predicts what is masked: it learns what it put out
    data, loss = task_loss(ResidentModel(masked), Calibration(windows(3, 8).ids, None, {}))
    assert len(data.ids) == 3 and float(loss([0, 1]).detach()) == 0


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_encoders_of_speech_are_pruned_factorized_saved_and_loaded(kind, tmp_path):
    model = wav2vec2() if kind == "wav2vec2" else whisper_encoder()
    dense = sum(p.numel() for p in model.parameters())
    report = corank.compress(model, METHOD, keep=0.6, data=sound(kind), steps=8, batch=2, out=tmp_path / "small")
    sites = report.accounting["sites"]
    assert 0.45 * sites["dense"] < sites["compressed"] <= 0.6 * sites["dense"]
    factors = [n for n, m in model.named_modules() if isinstance(m, LowRankLinear)]
    assert factors and sum(p.numel() for p in model.parameters()) == dense - sites["dense"] + sites["compressed"]
    again, _ = corank.load(tmp_path / "small")
    for given in sound(kind, 2):
        torch.testing.assert_close(outputs(again, given), outputs(model, given), rtol=1e-5, atol=1e-6)
    for row in report.sites:
        m, n = row["shape"]
        assert row["kind"] == "dense" or row["rank"] * (m + n) < m * n


def test_examples_tell_the_shapes_to_a_method_that_measures_nothing():
    model = wav2vec2()
    report = corank.compress(model, "svd", keep=0.6, data=sound("wav2vec2"))
    assert 0 < report.accounting["sites"]["compressed"] <= 0.6 * report.accounting["sites"]["dense"]
    assert report.data == {}


def test_nothing_changes_if_nothing_has_to_go():
    model = tiny("llama-gqa")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    corank.compress(model, METHOD, keep=1, tokenizer=tokenizer(), **DATA)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_allocator_takes_the_pruned_matrices():
    model = tiny("llama-gqa")
    given = dict(density=0.2, by="magnitude", rate=1e-12, steps=4, allocate="lagrange")
    report = corank.compress(model, METHOD, keep=0.9, tokenizer=tokenizer(), **given, **DATA)
    stayed = [row for row in report.sites if row["kind"] == "dense"]
    assert report.accounting["sites"]["compressed"] <= 0.9 * report.accounting["sites"]["dense"]
    for row in stayed:
        W = model.get_submodule(row["name"]).weight
        assert int((W != 0).sum()) == round(0.2 * W.numel())


@pytest.mark.parametrize("after", [3, 8])  # in the pruning, and in the selection
def test_an_interrupted_training_goes_on_where_it_was(after, tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    given = dict(keep=0.7, steps=8, **DATA)
    corank.compress(folder, METHOD, out=tmp_path / "whole", **given)
    calls = 0

    def interrupt(layer, stage, error):
        nonlocal calls
        calls += stage == "train"
        if calls == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corank.compress(folder, METHOD, out=tmp_path / "again", progress=interrupt, **given)
    assert (tmp_path / "again.training" / "pruning.pt").is_file() and not (tmp_path / "again").exists()
    corank.compress(folder, METHOD, out=tmp_path / "again", **given)
    assert not (tmp_path / "again.training").exists()
    whole, again = (corank.load(tmp_path / f)[0] for f in ("whole", "again"))
    for (n, a), (m, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert n == m and torch.equal(a, b)


def test_bad_input_is_told_before_anything_changes():
    model = tiny("llama-gqa")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for settings, words in [
        ({"keep": 0.001}, "keep more"),
        ({"keep": 0.7, "density": 0.0}, "density"),
        ({"keep": 0.7, "by": "luck"}, "way to choose weights"),
        ({}, "exactly one of keep"),
    ]:
        with pytest.raises(CorankError, match=words):
            corank.compress(model, METHOD, tokenizer=tokenizer(), **settings, **DATA)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert math.isfinite(sum(float(v.sum()) for v in before.values()))
