"""The operations as torch sees them: where no program runs, their gradients, and inside compiled graphs."""

from __future__ import annotations

import sys

import pytest
import torch
from kernel_cases import attention_case, check, linear_case, mlp_case, pivot_case, ups_case, wide

from corank import kernels
from corank.kernels import (
    latent_attention,
    latent_attention_twin,
    lowrank_linear,
    lowrank_linear_twin,
    lowrank_mlp,
    lowrank_mlp_twin,
    lowrank_ups,
    pivot_linear,
    pivot_linear_twin,
    supports_lowrank_linear,
)

ATTENTION = dict(B=2, heads=(4, 2), lengths=(3, 5), ranks=(3, 2), sizes=(4, 2))
CASES = {
    "lowrank_linear": (lowrank_linear, lowrank_linear_twin, linear_case(3, 5, 2, 4), {}),
    "rank 0": (lowrank_linear, lowrank_linear_twin, linear_case(3, 5, 0, 4), {}),
    "pivot_linear": (pivot_linear, pivot_linear_twin, pivot_case(3, 5, 2, 4), {}),
    "lowrank_mlp": (lowrank_mlp, lowrank_mlp_twin, mlp_case(3, 5, 7, (2, 3, 4)), {"act": "gelu"}),
    "lowrank_mlp plain": (lowrank_mlp, lowrank_mlp_twin, mlp_case(3, 5, 7, (2, 0, 4), gated=False), {"act": "silu"}),
    "latent_attention": (
        latent_attention,
        latent_attention_twin,
        attention_case(**ATTENTION, rope=True, bias=True, pad="left"),
        {"causal": True, "scale": 0.5, "q_offset": 2},
    ),
    "latent_attention window": (
        latent_attention,
        latent_attention_twin,
        attention_case(**ATTENTION, own=True),
        {"causal": True, "scale": 0.5, "q_offset": 2, "window": 2},
    ),
}


def learning(args):
    return tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )


@pytest.mark.parametrize("name", CASES)
def test_the_plain_form_gives_its_own_numbers_and_gradients(name):
    op, twin, args, options = CASES[name]
    check(op, twin, args, options)
    exact = learning(map(wide, args))
    assert torch.autograd.gradcheck(lambda *a: op(*a, **options), exact, eps=1e-6, atol=1e-6)
    grads = []
    for function in (op, twin):
        inputs = learning(args)
        function(*inputs, **options).square().sum().backward()
        grads.append([a.grad for a in inputs if isinstance(a, torch.Tensor) and a.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b if a is not None else None, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if " " not in name])
def test_torch_accepts_the_operation(name):
    op, _, args, options = CASES[name]
    torch.library.opcheck(op, learning(args), options)


@pytest.mark.parametrize("name", ["lowrank_linear", "lowrank_mlp", "latent_attention", "pivot_linear"])
def test_it_compiles_into_one_graph(name):
    op, twin, args, options = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a, **options) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), 2 * twin(*args, **options))


def test_second_factors_together():
    args = ups_case(3, (4, 6, 2), (2, 0, 3))
    z, weights, biases, offsets = args
    expected = [z[:, a : a + B.shape[1]] @ B.T + b for B, b, a in zip(weights, biases, offsets, strict=True)]
    for y, due in zip(lowrank_ups(*args), expected, strict=True):
        torch.testing.assert_close(y, due)
    torch.library.opcheck(lowrank_ups, args)


def test_no_tokens_and_many():
    for T in (0, 65):
        args = linear_case(T, 6, 3, 4)
        assert supports_lowrank_linear(*args) is not None
        assert check(lowrank_linear, lowrank_linear_twin, args).shape == (T, 4)
        assert check(lowrank_mlp, lowrank_mlp_twin, mlp_case(T, 6, 9, (2, 3, 2))).shape == (T, 6)
        assert check(pivot_linear, pivot_linear_twin, pivot_case(T, 6, 3, 9)).shape == (T, 9)
    vector = linear_case(1, 6, 3, 4)
    assert lowrank_linear(vector[0][0], *vector[1:]).shape == (4,)


def test_attention_equals_that_of_torch_on_rebuilt_keys_and_values():
    for causal in (False, True):
        args = tuple(map(wide, attention_case(2, (4, 2), (5, 5), (3, 2), (4, 4), bias=True)))
        q, pk, pv, Vk, Vv, bk, bv = args[:7]
        k, v = pk @ Vk + bk[:, None], pv @ Vv + bv[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(latent_attention(*args, causal=causal, scale=0.5), expected)


def test_a_prompt_in_pieces_is_the_prompt_at_once():
    args = attention_case(2, (4, 2), (7, 7), (3, 2), (4, 4), rope=True, pad="left")
    options = {"causal": True, "scale": 0.5, "window": 3}
    whole = latent_attention(*args, **options)
    pieces = [
        latent_attention(args[0][:, :, a:b], *args[1:], **options, q_offset=a) for a, b in ((0, 3), (3, 4), (4, 7))
    ]
    torch.testing.assert_close(torch.cat(pieces, 2), whole)


def test_what_does_not_fit_is_said():
    x, A, B, bias = linear_case(3, 6, 2, 4)
    reason = supports_lowrank_linear(x, A, B, bias)
    assert reason in ("the tensors are on the CPU", "Triton is not installed (pip install 'corank[kernels]')")


def test_the_package_needs_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    args = linear_case(3, 6, 2, 4)
    assert not kernels.have_triton() and "not installed" in supports_lowrank_linear(*args)
    check(lowrank_linear, lowrank_linear_twin, args)
    mine = [module for name, module in sys.modules.items() if name.startswith("corank.kernels")]
    assert mine and not [m.__name__ for m in mine if ".programs" in m.__name__ or hasattr(m, "triton")]
