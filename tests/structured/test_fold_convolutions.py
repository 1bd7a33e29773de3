"""Folding of convolutions: which channels go together, exactness on planted clusters, batch norms, and what is stored."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf

import corank
from corank import cli
from corank.errors import CorankError
from corank.model import ResidentModel, Text
from corank.structured.convolutions import features_of, fold_group, measure_norms, sizes_after
from corank.structured.coupling import coupled
from tiny import text, tiny, tokenizer


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resnet(kind="basic", embedding=8, hidden=(8, 12), depths=(2, 2), dtype=torch.float64, **more):
    torch.manual_seed(0)
    config = tf.ResNetConfig(
        embedding_size=embedding, hidden_sizes=list(hidden), depths=list(depths), layer_type=kind, num_labels=5, **more
    )
    return with_norms(tf.ResNetForImageClassification(config).eval().to(dtype))


def with_norms(model):
    """Batch norms that do something."""
    with torch.no_grad():
        for i, (_, m) in enumerate(model.named_modules()):
            if isinstance(m, torch.nn.BatchNorm2d):
                n = m.num_features
                m.weight.copy_(1 + 0.3 * randn(n, seed=i))
                m.bias.copy_(0.3 * randn(n, seed=i + 1))
                m.running_mean.copy_(0.3 * randn(n, seed=i + 2))
                m.running_var.copy_(0.5 + randn(n, seed=i + 3).square())
    return model


PIXELS = randn(3, 3, 32, 32, seed=9)


@torch.no_grad()
def logits(model, pixels=PIXELS):
    return model(pixels.to(next(model.parameters()).dtype)).logits


def planted(model, groups=None):
    """Every feature map consists of two copies of its first half."""
    with torch.no_grad():
        for group in groups or coupled(model):
            half = group.count // 2
            for axis in group.made:
                owner, _, leaf = axis.tensor.rpartition(".")
                value = getattr(model.get_submodule(owner), leaf)
                value[half : 2 * half] = value[:half].clone()
    return model


def test_channels_that_are_added_go_together():
    basic = coupled(resnet(depths=(2, 1)))
    made = [sorted(a.tensor for a in g.made if a.tensor.endswith("convolution.weight")) for g in basic]
    stem, stage = "resnet.embedder.embedder", "resnet.encoder.stages.0.layers"
    # no shortcut: the first stage adds to what the stem has made
    together = [f"{stem}.convolution.weight", *(f"{stage}.{i}.layer.1.convolution.weight" for i in range(2))]
    assert made[0] == sorted(together) and [g.count for g in basic] == [8, 8, 8, 12, 12]
    last = basic[-1]
    assert {a.tensor for a in last.read} == {"classifier.1.weight"}
    assert last.norms[f"{'resnet.encoder.stages.1.layers.0'}.shortcut.normalization"].endswith("shortcut.convolution")
    bottleneck = coupled(resnet("bottleneck", 8, (16, 24), (1, 1)))
    assert [g.count for g in bottleneck] == [8, 4, 4, 16, 6, 6, 24]
    whole = tf.ResNetModel(resnet().config)  # it returns the last feature map
    assert [g.count for g in coupled(whole)] == [8, 8, 8, 12, 12]


def test_depthwise_convolutions_follow_and_what_is_looked_at_otherwise_stays():
    torch.manual_seed(0)
    config = tf.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=5, finegrained_output=False)
    mobile = with_norms(tf.MobileNetV2ForImageClassification(config).eval().double())
    groups = coupled(mobile)
    deep = [g for g in groups if sum("conv_3x3.convolution.weight" in a.tensor for a in g.made)]
    assert len(deep) > 10
    before = logits(planted(mobile, groups))
    for group in groups:
        fold_group(mobile, group, group.count // 2 + group.count % 2)
    assert torch.allclose(logits(mobile), before, rtol=0, atol=1e-9 * float(before.abs().max()))
    conv = mobile.get_submodule(deep[0].made[0].tensor.rpartition(".")[0])
    assert conv.out_channels == deep[0].count // 2 + deep[0].count % 2
    next_ = tf.ConvNextForImageClassification(tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
    assert coupled(next_) == []


@pytest.mark.parametrize("repair", ["weights", "none"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_planted_clusters_cost_nothing(kind, repair):
    """Half of the channels of every feature map are copies; whatever reads them reads both."""
    model = planted(resnet(kind, 8, (8, 16) if kind == "basic" else (16, 32)))
    before, groups = logits(model), coupled(model)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    expected = sizes_after(shapes, groups, [g.count // 2 for g in groups])
    for group in groups:
        labels = fold_group(model, group, group.count // 2, repair=repair == "weights")
        assert torch.equal(labels, torch.arange(group.count) % (group.count // 2))
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-10 * float(before.abs().max()))


def test_as_many_clusters_as_channels_change_nothing():
    model = resnet()
    before = logits(model)
    for group in coupled(model):
        assert fold_group(model, group, group.count).tolist() == list(range(group.count))
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-12 * float(before.abs().max()))


def test_channels_are_compared_by_what_they_compute():
    """A row twice as large behind a norm with twice the mean and four times the variance is the same channel."""
    model = resnet(depths=(1, 1))
    group = coupled(model)[1]
    conv, norm = (model.get_submodule(p) for p in (group.made[0].tensor.rpartition(".")[0], next(iter(group.norms))))
    with torch.no_grad():
        conv.weight[5] = 2 * conv.weight[2]
        norm.running_mean[5], norm.running_var[5] = 2 * norm.running_mean[2], 4 * norm.running_var[2] + 3 * norm.eps
        norm.weight[5], norm.bias[5] = norm.weight[2], norm.bias[2]
    rows = features_of(model, group)
    assert torch.allclose(rows[5], rows[2], rtol=1e-12)
    before = logits(model)
    labels = fold_group(model, group, 7)
    assert labels[5] == labels[2] and len(labels.unique()) == 7
    merged = model.get_buffer(f"{next(iter(group.norms))}.running_var")
    assert merged[labels[2]] == pytest.approx(float((1.5**2) * (norm_var(model, group, labels, 2))), rel=1e-4)
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-4 * float(before.abs().max()))


def norm_var(model, group, labels, channel):
    """The variance that channel had: with_norms gave it."""
    fresh = resnet(depths=(1, 1))
    return fresh.get_buffer(f"{next(iter(group.norms))}.running_var")[channel]


def test_the_repair_from_weights_is_the_variance_of_the_mean_on_white_inputs():
    """Against a convolution of white noise: the variance of every cluster's mean, from the folded rows themselves."""
    model = resnet(depths=(1, 1))
    group = coupled(model)[1]
    path, name = group.made[0].tensor.rpartition(".")[0], next(iter(group.norms))
    rows = model.get_submodule(path).weight.detach().flatten(1)
    model.get_submodule(name).running_var.copy_(rows.square().sum(1))  # of inputs that are white, of variance one
    fold_group(model, group, 3)
    folded = model.get_submodule(path).weight.detach().flatten(1)
    assert torch.allclose(model.get_buffer(f"{name}.running_var"), folded.square().sum(1), rtol=1e-10)
    mean_of_variances = resnet(depths=(1, 1))
    mean_of_variances.get_submodule(name).running_var.copy_(rows.square().sum(1))
    fold_group(mean_of_variances, coupled(mean_of_variances)[1], 3, repair=False)
    assert (mean_of_variances.get_buffer(f"{name}.running_var") >= folded.square().sum(1) - 1e-12).all()


def test_norms_are_measured_on_data():
    model = resnet(depths=(1, 1))
    seen = []
    first = model.resnet.embedder.embedder
    hook = first.convolution.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    batches = [{"pixel_values": randn(2, 3, 32, 32, seed=s)} for s in (1, 2)]
    measure_norms(model, batches)
    hook.remove()
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    assert torch.allclose(first.normalization.running_mean, means)
    assert torch.allclose(first.normalization.running_var, variances)
    assert not first.normalization.training and first.normalization.momentum == 0.1


@pytest.mark.parametrize(
    ("kind", "keep", "protect"), [("basic", 0.6, ""), ("bottleneck", 0.6, ""), ("basic", 0.9, "1")]
)
def test_a_directory_comes_back_with_its_budget_met(kind, keep, protect, tmp_path):
    """With the second stage as it was, that the first one adds to as well, only inner channels go: no configuration says so."""
    hidden = (8, 12) if kind == "basic" else (16, 32)
    model = resnet(kind, 8, hidden)
    model.save_pretrained(tmp_path / "dense")
    settings = {"protect": protect} if protect else {}
    exact = {"dtype": torch.float64, "out": tmp_path / "out"}
    report = corank.compress(str(tmp_path / "dense"), "fold", keep=keep, **exact, **settings)
    assert keep - 0.2 < report.kept() <= keep
    memory = resnet(kind, 8, hidden)
    inside = corank.compress(memory, "fold", keep=keep, **settings)
    loaded, _ = corank.load(tmp_path / "out", dtype=torch.float64)
    assert type(loaded) is type(model) and torch.allclose(logits(loaded), logits(memory), rtol=0, atol=1e-12)
    assert inside.extra["structure"] == report.extra["structure"]
    stored = {s.name: s for s in ResidentModel(resnet(kind, 8, hidden)).outline.sites}
    for row in report.sites:
        weight = loaded.get_submodule(row["name"]).weight
        assert row["params"] == weight.numel() and row["params_dense"] == stored[row["name"]].numel
    count = sum(p.numel() for p in loaded.parameters())
    assert report.accounting["model"] == {"dense": sum(p.numel() for p in model.parameters()), "compressed": count}
    corank.verify(tmp_path / "out")
    ordinary = not protect
    assert report.ordinary == ordinary and report.extra["structure"]["class"] == ("N0" if ordinary else "N2")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) != ordinary
    if ordinary:
        plain = tf.AutoModelForImageClassification.from_pretrained(tmp_path / "out", dtype=torch.float64)
        assert torch.equal(logits(plain), logits(loaded)) and plain.config.hidden_sizes[-1] < hidden[-1]
    else:
        bare = tf.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float64)
        assert torch.isfinite(bare(PIXELS).last_hidden_state).all()
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(corank.load(tmp_path / "again", dtype=torch.float64)[0]), logits(loaded))
        with pytest.raises(CorankError, match="widths of their own"):
            corank.dequantize(loaded)


def test_data_repair_the_whole_model_and_bad_input():
    model = resnet()
    images = [{"pixel_values": randn(4, 3, 32, 32, seed=s)} for s in range(2)]
    corank.compress(model, "fold", keep=0.5, repair="data", data=images)
    norm = model.resnet.embedder.embedder
    with torch.no_grad():
        seen = [norm.convolution(b["pixel_values"]).mean((0, 2, 3)) for b in images]
    assert torch.allclose(norm.normalization.running_mean, torch.stack(seen).mean(0))
    model = resnet()
    dense = sum(p.numel() for p in model.parameters())
    corank.compress(model, "fold", keep=0.6, scope="model")
    assert 0.4 * dense < sum(p.numel() for p in model.parameters()) <= 0.6 * dense
    model = resnet()
    before = logits(model)
    report = corank.compress(model, "fold", keep=1.0)
    assert torch.equal(logits(model), before) and report.ordinary
    report = corank.compress(model, "fold", keep=0.8, protect="0", multiple_of=2)
    assert all("stages.0" not in g["made_by"] and g["after"] % 2 == 0 for g in report.extra["structure"]["folded"])
    with pytest.raises(CorankError, match="repair=data measures batch norms on images"):
        corank.compress(resnet(), "fold", keep=0.8, repair="data", data=Text(text(), "words"), tokenizer=tokenizer())
    with pytest.raises(CorankError, match="which this model is not"):
        more = {"data": Text(text(), "words"), "samples": 4, "length": 16}
        corank.compress(tiny("llama-gqa"), "fold", keep=0.8, repair="data", tokenizer=tokenizer(), **more)
    with pytest.raises(CorankError, match="way to repair batch norms"):
        corank.compress(resnet(), "fold", keep=0.8, repair="magic")
    with pytest.raises(CorankError, match="below what one channel in every layer"):
        corank.compress(resnet(), "fold", keep=0.001)


def test_the_command_line(tmp_path, capsys):
    resnet(dtype=torch.float32).save_pretrained(tmp_path / "dense")
    command = ["compress", str(tmp_path / "dense"), "--method", "fold", "--keep", "0.8"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    plain = tf.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.isfinite(logits(plain)).all() and plain.config.embedding_size < 8
    assert cli.main([*command, "--set", "repair=data", "--out", str(tmp_path / "no")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "repair=data measures batch norms on images" in said[-1] and not (tmp_path / "no").exists()
