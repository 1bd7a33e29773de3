"""W' + D C in factors, against the dense sum and its singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from corank.errors import CorankError
from corank.factors import Dense, LowRank, SharedBasis
from corank.heal.growth import grown, grown_together, truncated
from factorized import factors_of

M, N, K, R = 14, 17, 4, 3


def parts(seed=0, dtype=torch.float64, m=M):
    g = torch.Generator().manual_seed(seed)
    D, C = torch.randn(m, R, generator=g), torch.randn(R, N, generator=g)
    return D.to(dtype), C.to(dtype)


def weight(seed=1, m=M):
    return torch.randn(m, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bias", [None, "own", "added", "both"])
@pytest.mark.parametrize("kind", ["low_rank", "cur", "row_pivoted", "column_pivoted"])
def test_the_sum_is_exact(kind, bias):
    own = torch.ones(M, dtype=torch.float64) if bias in ("own", "both") else None
    extra = torch.full((M,), 2.0) if bias in ("added", "both") else None
    layer = factors_of(kind, weight(), K).module(own)
    D, C = parts()
    new = grown(layer, D, C, extra)
    torch.testing.assert_close(new.dense_weight(), layer.dense_weight() + D @ C, rtol=1e-10, atol=1e-10)
    assert new.rank == K + R and new.kind == ("low_rank" if kind == "cur" else kind)
    x = torch.randn(5, N, dtype=torch.float64)
    due = layer(x) + x @ C.T @ D.T + (0 if extra is None else 2)
    torch.testing.assert_close(new(x), due, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["low_rank", "cur", "row_pivoted", "column_pivoted"])
def test_the_truncated_sum_is_the_nearest_of_its_rank(kind):
    layer = factors_of(kind, weight(), K).module()
    D, C = parts()
    total = layer.dense_weight() + D @ C
    new = grown(layer, D, C, rank=K)
    U, S, Vh = torch.linalg.svd(total)
    assert new.rank == K and new.kind == ("low_rank" if kind == "cur" else kind)
    torch.testing.assert_close(new.dense_weight(), (U[:, :K] * S[:K]) @ Vh[:K], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["low_rank", "row_pivoted", "column_pivoted"])
def test_what_would_not_be_smaller_becomes_dense(kind):
    layer = factors_of(kind, weight(), 12).module()
    D, C = parts()
    new = grown(layer, D, C)
    assert new.kind == "dense"
    torch.testing.assert_close(new.weight, layer.dense_weight() + D @ C, rtol=1e-10, atol=1e-10)
    once_more = grown(new, D, C)
    torch.testing.assert_close(once_more.weight, new.weight + D @ C)


def test_sixteen_bit_factors_are_not_rounded_again():
    layer = factors_of("low_rank", weight().bfloat16(), K).module()
    D, C = parts(dtype=torch.float32)
    new = grown(layer, D, C)
    assert torch.equal(new.up.weight[:, :K], layer.up.weight) and torch.equal(new.down.weight[:K], layer.down.weight)
    assert torch.equal(new.up.weight[:, K:], D.bfloat16()) and torch.equal(new.down.weight[K:], C.bfloat16())


def group(sizes=(20, 15, 15)):
    A = torch.randn(K, N, dtype=torch.float64)
    names = [f"m{i}" for i in range(len(sizes))]
    shared = SharedBasis(A, {n: torch.randn(m, K, dtype=torch.float64) for n, m in zip(names, sizes, strict=True)})
    return shared.modules({"m1": torch.ones(sizes[1], dtype=torch.float64)})


def test_layers_that_share_a_basis_go_on_sharing_one():
    layers = group()
    additions = {n: (*parts(i, m=layers[n].out_features), None) for i, n in enumerate(("m1", "m2"))}
    new = grown_together(layers, additions)
    assert [m.kind for m in new.values()] == ["low_rank", "shared", "shared"]
    assert {m.rank for m in new.values()} == {K + 2 * R} and new["m2"].down is new["m0"].down
    for name, layer in layers.items():
        D, C, _ = additions.get(name, (torch.zeros(layer.out_features, 1).double(), torch.zeros(1, N).double(), None))
        torch.testing.assert_close(new[name].dense_weight(), layer.dense_weight() + D @ C)
    assert torch.equal(new["m1"].bias, torch.ones(15, dtype=torch.float64)) and new["m0"].bias is None


def test_a_truncated_group_has_the_best_common_basis():
    layers = group()
    additions = {n: (*parts(i, m=layers[n].out_features), None) for i, n in enumerate(layers)}
    stacked = torch.cat([layers[n].dense_weight() + D @ C for n, (D, C, _) in additions.items()])
    new = grown_together(layers, additions, rank=K)
    found = torch.cat([m.dense_weight() for m in new.values()])
    S = torch.linalg.svdvals(stacked)
    torch.testing.assert_close((stacked - found).square().sum(), S[K:].square().sum())
    assert new["m1"].kind == "shared" and new["m1"].rank == K


def test_a_group_that_would_not_be_smaller_becomes_dense():
    layers = group((6, 6))
    new = grown_together(layers, {n: (*parts(m=6), torch.ones(6)) for n in layers})
    assert {m.kind for m in new.values()} == {"dense"} and all(m.bias is not None for m in new.values())
    D, C = parts(m=6)
    torch.testing.assert_close(new["m1"].weight, layers["m1"].dense_weight() + D @ C)


def test_truncation_of_a_product_without_multiplying_it():
    B, A = torch.randn(30, 9), torch.randn(9, 20)
    U, S, Vh = torch.linalg.svd((B @ A).double())
    for rank in (0, 1, 5, 9, 30):
        left, right = truncated(B, A, rank)
        k = min(rank, 9)
        assert left.shape == (30, k) and right.shape == (k, 20) and left.dtype == torch.float32
        torch.testing.assert_close((left @ right).double(), (U[:, :k] * S[:k]) @ Vh[:k], rtol=1e-4, atol=1e-4)


def test_quantized_factors_do_not_grow():
    pytest.importorskip("torchao")
    from corank.checkpoint.integers import StoredLinear, as_linear, quantize

    layer = factors_of("low_rank", torch.randn(M, N), 8).module()
    spec, tensors = quantize(layer.down.weight.detach(), 8, 32)
    stored = StoredLinear((8, N), spec, False, "cpu", torch.float32)
    for name, tensor in tensors.items():
        setattr(stored, name, tensor)
    layer.down = as_linear(stored)
    with pytest.raises(CorankError, match="quantized"):
        grown(layer, *parts(dtype=torch.float32))


def test_dense_is_what_grows_when_the_layer_is_dense():
    layer = Dense(weight()).module()
    D, C = parts()
    assert torch.equal(grown(layer, D, C).weight, layer.weight + D @ C)
    assert LowRank(D, C).dense().shape == (M, N)
