"""The Triton programs, run by Triton's interpreter on the CPU, against their plain forms in double precision.

Not collected by itself: Triton decides when it is imported whether it interprets, so `test_kernel_programs.py` runs this
file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import attention_case, check, linear_case, mlp_case, pivot_case, ups_case

from corank.kernels import (
    latent_attention,
    latent_attention_twin,
    lowrank_linear,
    lowrank_linear_twin,
    lowrank_mlp,
    lowrank_mlp_twin,
    lowrank_ups,
    lowrank_ups_twin,
    pivot_linear,
    pivot_linear_twin,
    supports_latent_attention,
    supports_lowrank_linear,
    supports_lowrank_mlp,
    supports_lowrank_ups,
    supports_pivot_linear,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "T,n,k,m,dtype,bias",
    [
        (1, 65, 33, 40, F32, True),
        (3, 40, 17, 31, F16, False),
        (16, 70, 5, 20, BF16, True),
        (64, 33, 16, 7, F32, False),
    ],
)
def test_lowrank_linear(T, n, k, m, dtype, bias):
    args = linear_case(T, n, k, m, dtype, bias)
    assert supports_lowrank_linear(*args) is None
    check(lowrank_linear, lowrank_linear_twin, args)


@pytest.mark.parametrize(
    "T,n,k,m,dtype,bias", [(1, 65, 33, 40, F32, True), (3, 40, 16, 50, BF16, False), (5, 9, 6, 6, F32, True)]
)
def test_pivot_linear_scatters_as_it_stores(T, n, k, m, dtype, bias):
    args = pivot_case(T, n, k, m, dtype, bias)
    assert supports_pivot_linear(*args) is None
    y = check(pivot_linear, pivot_linear_twin, args)
    if not bias:  # the pivots are the product with the rows, to the last bit
        z = lowrank_linear(args[0], args[1], torch.eye(k, dtype=dtype))
        assert torch.equal(y[:, args[3].long()], z)


@pytest.mark.parametrize(
    "T,n,D,ranks,dtype,bias,gated,act",
    [
        (1, 24, 70, (17, 33, 20), F32, True, True, "silu"),
        (3, 20, 40, (16, 5, 40), F16, False, True, "gelu"),
        (20, 9, 33, (7, 0, 3), BF16, True, False, "gelu_tanh"),
        (65, 8, 16, (9, 4, 5), F32, True, True, "relu2"),
        (2, 8, 16, (9, 0, 5), F32, False, False, "relu"),
    ],
)
def test_lowrank_mlp(T, n, D, ranks, dtype, bias, gated, act):
    args = mlp_case(T, n, D, ranks, dtype, bias, gated)
    assert supports_lowrank_mlp(*args, act=act) is None
    check(lowrank_mlp, lowrank_mlp_twin, args, {"act": act})


@pytest.mark.parametrize(
    "case,options",
    [
        (dict(B=2, heads=(4, 2), lengths=(9, 9), ranks=(5, 33), sizes=(8, 8), rope=True, bias=True, pad="left"), dict(causal=True)),
        (dict(B=1, heads=(3, 1), lengths=(17, 20), ranks=(17, 4), sizes=(6, 10), own=True), dict(causal=False)),
        (
            dict(B=2, heads=(2, 2), lengths=(4, 21), ranks=(6, 6), sizes=(16, 16), dtype=F16, rope=True, pad="right"),
            dict(causal=True, q_offset=17, window=6),
        ),
        (dict(B=1, heads=(4, 1), lengths=(5, 9), ranks=(3, 3), sizes=(7, 5), dtype=BF16, bias=True), dict(causal=True, q_offset=4)),
        (dict(B=2, heads=(2, 1), lengths=(3, 9), ranks=(4, 4), sizes=(4, 4), pad="all"), dict(causal=False)),
    ],
)  # fmt: skip
def test_latent_attention(case, options):
    args, options = attention_case(**case), {"scale": case["sizes"][0] ** -0.5, **options}
    assert supports_latent_attention(*args, **options) is None
    o = check(latent_attention, latent_attention_twin, args, options)
    if case.get("pad") == "all":
        assert (o[0] == 0).all() and (o[1] != 0).any()
    if case.get("pad") == "left":  # the first half of the first sequence sees nothing but padding
        assert (o[0, :, :4] == 0).all()


def test_a_row_is_the_same_alone_and_in_a_batch_and_twice():
    x, A, B, bias = linear_case(16, 70, 20, 9)
    y = lowrank_linear(x, A, B, bias)
    assert torch.equal(lowrank_linear(x, A, B, bias), y)
    assert torch.equal(lowrank_linear(x[:1], A, B, bias), y[:1])
    args = mlp_case(3, 9, 40, (5, 6, 7))
    assert torch.equal(lowrank_mlp(*args), lowrank_mlp(*args))


def test_leading_sizes_and_strides():
    x, A, B, bias = linear_case(12, 10, 4, 6)
    slanted = x.view(3, 4, 10).transpose(0, 1)
    torch.testing.assert_close(lowrank_linear(slanted, A, B, bias), lowrank_linear_twin(slanted, A, B, bias))
    padded = torch.randn(4, 16)[:, :10]  # rows of a wider matrix, as parts of packed factors are
    torch.testing.assert_close(lowrank_linear(x, padded, B, bias), lowrank_linear_twin(x, padded, B, bias))
    assert supports_lowrank_linear(x, A.T.contiguous().T, B, bias) == "a matrix is not stored row by row"


def test_shared_memory_that_is_too_small_takes_smaller_tiles():
    from triton.runtime.errors import OutOfResources

    from corank.kernels.launching import with_tiles

    tried = []

    def launch(size):
        tried.append(size)
        if size > 16:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return torch.tensor(size)

    assert with_tiles("a test", [64, 32, 16, 8], launch) == 16 and tried == [64, 32, 16]
    assert with_tiles("a test", [64, 32, 16, 8], launch) == 16 and tried == [64, 32, 16, 16]
    assert with_tiles("another", [64, 32], launch) is None


@pytest.mark.parametrize("T,sizes,dtype,bias", [(1, (20, 40, 7), F32, True), (5, (33, 9), BF16, False)])
def test_lowrank_ups_of_different_sizes(T, sizes, dtype, bias):
    ranks = (17, 5, 33)[: len(sizes)]
    args = ups_case(T, sizes, ranks, dtype, bias)
    assert supports_lowrank_ups(*args) is None
    for y, expected in zip(lowrank_ups(*args), lowrank_ups_twin(*args), strict=True):
        torch.testing.assert_close(
            y, expected, rtol=2e-2 if dtype == BF16 else 1e-5, atol=1e-2 if dtype == BF16 else 1e-5
        )


def run_model(model):
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


@pytest.mark.parametrize(
    "kind,name,runtime,options,operations",
    [
        ("low_rank", "llama-gqa", "triton", {}, {"lowrank_linear", "lowrank_ups", "lowrank_mlp"}),
        ("row_pivoted", "llama-tied", "triton", {}, {"pivot_linear"}),
        ("low_rank", "bert", "flashsvd", {"kernel": True, "least": 1}, {"latent_attention"}),
        ("low_rank", "qwen2-bias", "flashsvd", {"kernel": True, "least": 1}, {"latent_attention"}),
    ],
)
def test_models_run_on_the_programs(kind, name, runtime, options, operations):
    from torch.utils._python_dispatch import TorchDispatchMode

    from corank.runtime import set_runtime
    from factorized import compressed

    class Called(TorchDispatchMode):
        names = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model = compressed(kind, name, ranks=(5, 3, 4))
    expected = run_model(model)
    set_runtime(model, runtime, **options)
    with Called() as called:
        actual = run_model(model)
    assert operations <= called.names
    assert (actual - expected).abs().max() <= 5e-6 * expected.abs().max()
