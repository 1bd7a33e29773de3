"""The same on a GPU, where the programs are compiled: numbers, tiles that fit, graphs."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import attention_case, linear_case, mlp_case, pivot_case, ups_case

from corank import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


def on_gpu(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return [on_gpu(v) for v in value] if isinstance(value, list) else value


def compare(name, args, options=None):
    options = options or {}
    args = tuple(map(on_gpu, args))
    assert getattr(kernels, f"supports_{name}")(*args, **options) is None
    actual = getattr(kernels, name)(*args, **options)
    expected = getattr(kernels, f"{name}_twin")(*args, **options)
    for y, due in zip(*([v] if isinstance(v, torch.Tensor) else v for v in (actual, expected)), strict=True):
        assert torch.isfinite(y).all()
        error = (y.float() - due.float()).abs().max() / due.float().abs().max()
        assert error <= TOLERANCE[y.dtype], float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 3, 16, 64])
def test_few_tokens(T, dtype):
    compare("lowrank_linear", linear_case(T, 4096, 1024, 4096, dtype))
    compare("lowrank_linear", linear_case(T, 512, 48, 2048, dtype, bias=False))
    compare("pivot_linear", pivot_case(T, 1024, 256, 1024, dtype, bias=False))
    compare("lowrank_ups", ups_case(T, (4096, 1024, 1024), (1024, 320, 384), dtype))
    compare("lowrank_mlp", mlp_case(T, 4096, 14336, (1536, 1024, 1536), dtype, bias=False))
    compare("lowrank_mlp", mlp_case(T, 768, 3072, (96, 0, 96), dtype, gated=False), {"act": "gelu"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts(dtype):
    compare("lowrank_mlp", mlp_case(300, 768, 3072, (96, 64, 96), dtype))
    for causal in (False, True):
        args = attention_case(2, (8, 2), (200, 200), (64, 64), (64, 64), dtype, rope=True, bias=True, pad="left")
        compare("latent_attention", args, {"causal": causal, "scale": 0.125})


def test_the_same_bits_twice_and_in_a_graph():
    args = tuple(map(on_gpu, linear_case(16, 4096, 1024, 4096, torch.bfloat16)))
    expected = kernels.lowrank_linear(*args)
    assert torch.equal(kernels.lowrank_linear(*args), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.lowrank_linear(*args)
    for _ in range(2):
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("runtime", ["chunked", "packed", "triton", "flashsvd", "graph", "auto"])
def test_models_generate_the_same_tokens(runtime, tmp_path, monkeypatch):
    from corank import checkpoint
    from corank.runtime import set_runtime
    from factorized import compressed

    monkeypatch.setenv("CORANK_CACHE", str(tmp_path))
    model = compressed("low_rank", "llama-tied", ranks=(16,), layers=2).cuda()
    checkpoint.attach(model)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0)).cuda()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    set_runtime(model, runtime)
    assert torch.equal(model.generate(ids, **settings), expected)
