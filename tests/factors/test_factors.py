"""Every kind: the layer computes W' x + b, the counts are true, the ecosystem's verbs work on it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from factor_samples import SIZES, make
from torch import nn

from corank.errors import CorankError
from corank.factors import (
    CUR,
    KINDS,
    ColumnPivoted,
    FactorizedLinear,
    LowRank,
    RowPivoted,
    SharedLowRank,
    SharedLowRankLinear,
)

FACTORIZED = [kind for kind in KINDS if kind != "dense"]


def layer_of(factors, bias: torch.Tensor | None = None) -> nn.Module:
    """The layer, wired to an owner if it is a follower."""
    layer = factors.module(bias)
    if isinstance(layer, SharedLowRankLinear):
        layer.follow(LowRank(factors.B, factors.A).module())
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m,n,k", SIZES)
def test_dense_pair_and_layer_agree_with_the_definition(kind, m, n, k):
    factors, W = make(kind, m, n, k)
    B, A = factors.pair()
    assert factors.shape == (m, n)
    assert factors.rank == (min(m, n) if kind == "dense" else k) == B.shape[1] == A.shape[0]
    torch.testing.assert_close(factors.dense(), W, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B @ A, W, rtol=1e-12, atol=1e-12)
    b, x = torch.randn(m, dtype=W.dtype), torch.randn(2, 3, n, dtype=W.dtype)
    for bias in (None, b):
        layer = layer_of(factors, bias)
        expected = x @ W.T if bias is None else x @ W.T + bias
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(x[0, 0]), expected[0, 0], rtol=1e-12, atol=1e-12)
        assert layer(x[:0]).shape == (0, 3, m)
        torch.testing.assert_close(layer.dense_weight(), W, rtol=1e-12, atol=1e-12)
        assert (layer.in_features, layer.out_features, layer.rank) == (n, m, factors.rank)
        assert (layer.bias is None) == (bias is None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m,n,k", SIZES)
def test_counts_are_what_is_stored(kind, m, n, k):
    factors, _ = make(kind, m, n, k, torch.float32)
    tensors = factors.tensors()
    if kind == "shared":
        tensors.pop("A")
    assert factors.numel == factors.count(m, n, factors.rank) == sum(t.numel() for t in tensors.values())
    assert factors.nbytes == 4 * factors.numel  # fp32 and int32
    half = factors.astype(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    indices = factors.rank if "pivoted" in kind else 0
    assert half.nbytes == 2 * (factors.numel - indices) + 4 * indices
    layer = layer_of(factors)
    assert sum(t.numel() for t in layer.state_dict().values()) == factors.numel


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_two_per_multiply_add_of_the_matrices_applied(kind):
    m, n, k, tokens = 7, 5, 3, 11
    factors, _ = make(kind, m, n, k)
    layer = layer_of(factors)
    applied = 0

    def add(module, args, output):
        nonlocal applied
        applied += 2 * module.weight.numel() * tokens

    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    linears += [layer.down] if kind == "shared" else []
    for module in linears:
        module.register_forward_hook(add)
    layer(torch.randn(tokens, n, dtype=torch.float64))
    assert factors.flops(tokens) == applied


def test_counts_by_hand():
    # the numbers of the formulas, written out
    assert KINDS["low_rank"][0].count(4096, 4096, 1024) == 1024 * 8192
    assert KINDS["cur"][0].count(14336, 4096, 256) == 256 * (14336 + 4096) + 256**2
    assert KINDS["row_pivoted"][0].count(4096, 4096, 1199) == 1199 * (8192 - 1199) + 1199
    assert KINDS["column_pivoted"][0].count(6, 4, 4) == 6 * 4 + 4
    assert KINDS["dense"][0].count(6, 4, 1) == 24
    # CURing's own figure: q, k, gate of ten layers of Llama-3.1-8B at r = 256 leave 7,316,574,208 parameters
    cur = KINDS["cur"][0].count
    saved = sum(m * 4096 - cur(m, 4096, 256) for m in (4096, 1024, 14336))
    assert 8_030_261_248 - 10 * saved == 7_316_574_208


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [0, 3])
def test_from_spec_and_state_dict_round_trip(kind, bias, k):
    m, n = 7, 5
    factors, _ = make(kind, m, n, k, torch.float32)
    layer = layer_of(factors, torch.randn(m) if bias else None)
    spec = json.loads(json.dumps(layer.spec()))
    assert spec["kind"] == kind and spec["bias"] is bias and spec["shape"] == [m, n]
    assert {**factors.spec(), "bias": bias} == spec
    data_class, layer_class = KINDS[kind]
    assert isinstance(layer.factors(), data_class) and isinstance(layer, layer_class)
    x = torch.randn(4, n)
    for assign in (False, True):
        device = "meta" if assign else "cpu"
        empty = layer_class.from_spec(spec, bias=bias, device=device, dtype=torch.float32)
        assert {t.device.type for t in empty.state_dict().values()} == {device}
        assert list(empty.state_dict()) == list(layer.state_dict())
        if kind == "shared":
            empty.follow(layer._owner[0])
        missing = empty.load_state_dict(layer.state_dict(), assign=assign)
        assert not missing.missing_keys and not missing.unexpected_keys
        assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("kind", FACTORIZED)
def test_guard_is_an_empty_persistent_buffer_in_the_dtype_of_the_layer(kind):
    layer = layer_of(make(kind, 7, 5, 3)[0])
    assert isinstance(layer, FactorizedLinear)
    assert layer.state_dict()["weight"].shape == (0,) and "weight" not in dict(layer.named_parameters())
    assert layer.weight.dtype == torch.float64
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(5, 7, bias=False).load_state_dict(layer.state_dict(), strict=False)


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_cast_and_independence(kind):
    factors, W = make(kind, 7, 5, 3)
    layer = layer_of(factors, torch.zeros(7, dtype=torch.float64))
    clone = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    torch.testing.assert_close(clone.dense_weight(), W, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factors.dense(), W, rtol=1e-12, atol=1e-12)  # the layer owns a copy
    if kind == "shared":
        clone._owner[0].to(torch.bfloat16)
    clone.to(torch.bfloat16)
    y = clone(torch.randn(4, 5, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    for name, tensor in clone.state_dict().items():
        assert tensor.dtype == (torch.int32 if name == "pivots" else torch.bfloat16)


def test_layer_does_not_keep_the_basis_it_was_sliced_from_alive():
    basis = torch.randn(64, 64)
    layer = LowRank(basis[:, :2], basis[:2]).module()
    for weight in (layer.up.weight, layer.down.weight):
        assert weight.untyped_storage().nbytes() == 4 * weight.numel() and weight.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_trainable_tensor_and_only_those(kind):
    factors, W = make(kind, 7, 5, 3)
    layer = layer_of(factors, torch.zeros(7, dtype=torch.float64))
    layer(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == ({"down.weight", "up.weight"} if kind == "cur" else set())
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == (name in frozen)


def test_cur_stays_frozen_after_a_loader_has_replaced_its_parameters():
    layer = make("cur", 7, 5, 3)[0].module()
    for child in (layer.down, layer.link, layer.up):
        child.weight = nn.Parameter(child.weight.detach())
    layer.finalize()
    trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable == {"link.weight"}


def test_cur_merge_is_the_same_matrix_in_two_factors():
    factors, W = make("cur", 7, 5, 3)
    merged = factors.merge()
    assert merged.kind == "low_rank" and merged.rank == 3
    torch.testing.assert_close(merged.dense(), W, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind,k", [*((kind, 3) for kind in KINDS), ("row_pivoted", 0)])
def test_compile_fullgraph_and_export(kind, k):
    factors, _ = make(kind, 7, 5, k, torch.float32)
    layer = layer_of(factors, torch.randn(7))
    if kind == "shared":  # a follower lives in a model that holds its owner too
        layer = nn.Sequential(nn.ModuleDict({"owner": layer._owner[0], "follower": layer}))[0]
        call = _Pair(layer)
    else:
        call = layer
    x = torch.randn(2, 4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, call(x))
    y.sum().backward()
    exported = torch.export.export(call, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), call(x))


class _Pair(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers["owner"](x) + self.layers["follower"](x)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_products_accumulate_in_fp32(kind):
    factors, _ = make(kind, 33, 65, 31, torch.float32)
    half = factors.astype(torch.bfloat16)
    exact = half.astype(torch.float64).dense()
    # one rounding of the result (cur: the product C M R is one chain)
    assert half.dense().dtype == torch.bfloat16
    assert ((half.dense().double() - exact).abs() <= 2**-8 * exact.abs() + 1e-3).all()


@pytest.mark.parametrize(
    "build",
    [
        lambda: LowRank(torch.zeros(4, 2), torch.zeros(3, 5)),
        lambda: CUR(torch.zeros(4, 2), torch.zeros(2, 3), torch.zeros(2, 5)),
        lambda: RowPivoted(torch.tensor([0, 0]), torch.zeros(2, 5), torch.zeros(2, 2)),
        lambda: RowPivoted(torch.tensor([0, 4]), torch.zeros(2, 5), torch.zeros(2, 2)),
        lambda: RowPivoted(torch.tensor([0, 1]), torch.zeros(3, 5), torch.zeros(2, 2)),
        lambda: ColumnPivoted(torch.tensor([0, -1]), torch.zeros(4, 2), torch.zeros(2, 3)),
        lambda: SharedLowRank(torch.zeros(4, 2), torch.zeros(3, 5), "x"),
    ],
)
def test_inconsistent_factors_are_refused(build):
    with pytest.raises(CorankError):
        build()
