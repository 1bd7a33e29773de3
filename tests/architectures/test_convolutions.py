"""A convolution is a matrix applied to patches; its factors are two convolutions."""

from __future__ import annotations

import pytest
import torch
from families import batches, inputs, logits, make
from torch import nn

import corank
from corank import checkpoint
from corank.engine.forms import new_statistics, take_in
from corank.errors import CorankError
from corank.factors import FactorizedConv2d, LowRank, as_stock, layer_for, patches, replace, weight_of
from corank.model import outline
from corank.model.archs import is_convolution

CONVS = {
    "plain": dict(kernel_size=3, padding=1),
    "patch": dict(kernel_size=4, stride=4),
    "uneven": dict(kernel_size=(3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False),
    "one by one": dict(kernel_size=1, stride=2),
}


def conv(name):
    torch.manual_seed(0)
    return nn.Conv2d(5, 7, **CONVS[name]).double()


def image():
    return torch.randn(2, 5, 12, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", CONVS)
def test_its_matrix_is_applied_to_patches(name):
    layer, x = conv(name), image()
    y = patches(layer, x) @ weight_of(layer).T
    y = y if layer.bias is None else y + layer.bias
    torch.testing.assert_close(y.mT.reshape(layer(x).shape), layer(x))


@pytest.mark.parametrize("rank", [0, 3, 7])
@pytest.mark.parametrize("name", CONVS)
def test_two_convolutions_compute_the_product(name, rank):
    layer, x = conv(name), image()
    W = weight_of(layer)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    made = layer_for(layer, LowRank(U[:, :rank] * S[:rank], Vt[:rank]), layer.bias)
    assert isinstance(made, FactorizedConv2d) and made.rank == min(rank, *W.shape)
    with torch.no_grad():
        layer.weight.copy_(made.dense_weight().view_as(layer.weight))
    torch.testing.assert_close(made(x), layer(x))
    stock = as_stock(made, False)
    assert type(stock) is nn.Conv2d and str(stock) == str(layer)
    torch.testing.assert_close(stock(x), layer(x))
    empty = FactorizedConv2d.from_spec(made.spec(), layer.bias is not None, dtype=torch.float64)
    empty.load_state_dict(made.state_dict())
    assert torch.equal(empty(x), made(x)) and empty.spec() == made.spec()
    if rank >= min(W.shape):
        torch.testing.assert_close(made.dense_weight(), W)


def test_what_is_not_one_matrix_is_no_site():
    assert is_convolution(nn.Conv2d(4, 4, 3))
    for other in (dict(groups=2), dict(padding_mode="reflect", padding=1), dict(padding="same")):
        assert not is_convolution(nn.Conv2d(4, 4, 3, **other))


def resnet_sites():
    return outline(make("resnet").config).sites


def test_statistics_are_of_the_patches():
    site = next(s for s in resnet_sites() if s.shape[1] == 8 * 9)
    layer = make("resnet").get_submodule(site.name)
    x = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(2))
    statistic = new_statistics({"gram"}, site)["gram"]
    take_in(statistic, site, layer, x, None)
    rows = patches(layer, x).flatten(0, 1).double()
    assert statistic.count == len(rows)
    torch.testing.assert_close(statistic.result().G, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_convolutions_share_statistics_only_if_they_look_alike():
    """A shortcut and the first convolution of a stage read one tensor through different windows."""
    sites = resnet_sites()
    first = next(s for s in sites if s.layer == 1)
    shortcut = next(s for s in sites if s.layer == 1 and "shortcut" in s.name)
    assert shortcut.group == shortcut.name != first.group


def test_a_convolution_takes_two_plain_factors_and_nothing_else():
    from corank.factors import CUR

    layer = conv("plain")
    with pytest.raises(CorankError, match="A convolution is stored as a plain pair of factors .* not as cur"):
        layer_for(layer, CUR(torch.zeros(7, 2), torch.zeros(2, 2), torch.zeros(2, 45)), None)
    with pytest.raises(CorankError, match="the sizes must agree"):
        replace(nn.Sequential(layer), "0", FactorizedConv2d(torch.zeros(7, 2), torch.zeros(2, 9), CONV_1))


CONV_1 = {"kernel_size": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}


@pytest.mark.parametrize(
    "settings",
    [dict(target="anchored"), dict(refit=True), dict(pack=True), dict(allocate="lagrange"), dict(targets=["conv"])],
    ids=str,
)
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_every_way_of_compressing_works_on_images(name, settings, tmp_path):
    if settings.get("targets") and name == "resnet":
        pytest.skip("nothing but convolutions in its blocks")
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    run = dict(method="svd-llm", keep=0.7, data=batches(name), **settings)
    report = corank.compress(model, **run)
    corank.compress(tmp_path / "dense", out=tmp_path / "out", **run)
    loaded, words = checkpoint.load(tmp_path / "out")
    assert words is None
    found, wanted = loaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)
    torch.testing.assert_close(logits(loaded, inputs(name)), logits(model, inputs(name)))
    convolutions = [r for r in report.sites if r["role"] == "conv"]
    assert all(r["kind"] == "dense" or (r["kind"] == "low_rank" and 0 < r["loss"] < 1) for r in convolutions)
    assert any(r["kind"] != "dense" for r in report.sites)
    if settings.get("targets"):
        assert [r["layer"] for r in convolutions] == [None]
    elif name == "resnet":
        assert len(convolutions) == len(report.sites) > 0
    pivots = sum(b.numel() for n, b in model.named_buffers() if n.endswith("pivots"))
    assert sum(p.numel() for p in model.parameters()) + pivots == report.accounting["model"]["compressed"]


def test_the_predicted_loss_of_a_convolution_is_that_of_its_outputs():
    model, dense = make("resnet", torch.float64), make("resnet", torch.float64)
    report = corank.compress(model, "svd-llm", keep=0.5, data=batches("resnet"))
    row = report.sites[0]
    outputs = []
    dense.get_submodule(row["name"]).register_forward_pre_hook(lambda _m, args: outputs.append(args[0]))
    for batch in batches("resnet"):
        logits(dense, batch)
    x = torch.cat(outputs)
    with torch.no_grad():
        y, z = dense.get_submodule(row["name"])(x), model.get_submodule(row["name"])(x)
    assert float((y - z).norm() / y.norm()) == pytest.approx(row["loss"], rel=1e-6)
    assert row["loss"] == pytest.approx(row["predicted_loss"], rel=1e-6)
