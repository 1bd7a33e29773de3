"""What no kernel can take goes the plain way, with one line in the log; compiled models take any length."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import linear_case, mlp_case, pivot_case

import corank.kernels.launching as launching
from corank.factors import LowRank
from corank.kernels import (
    lowrank_linear,
    lowrank_linear_twin,
    lowrank_mlp,
    lowrank_mlp_twin,
    pivot_linear,
    pivot_linear_twin,
    supports_lowrank_linear,
)
from corank.runtime import set_runtime
from corank.runtime.dispatch import Table, stamp
from corank.runtime.override import _noted
from tiny import tiny

CPU = torch.device("cpu")


@pytest.fixture
def programs_run_here(monkeypatch):
    """As in Triton's interpreter, so that not everything is refused for being on the CPU."""
    monkeypatch.setattr(launching, "have_triton", lambda: True)
    monkeypatch.setattr(launching, "interpreted", lambda: True)


def stand_in(device="cuda", dtype=torch.float16):
    """What `unsuitable` asks of a tensor, of a device that this machine may not have."""
    return SimpleNamespace(
        device=torch.device(device),
        is_cuda=device == "cuda",
        dtype=dtype,
        is_floating_point=lambda: True,
        dim=lambda: 1,
    )


@pytest.mark.parametrize(
    ("x", "other", "sizes", "reason"),
    [
        (stand_in("xpu"), None, (), "no kernels for xpu"),
        (stand_in(dtype=torch.float64), None, (), "no kernels for float64"),
        (stand_in(dtype=torch.int8), None, (), "no kernels for int8"),
        (stand_in(), stand_in(dtype=torch.float32), (), "different dtypes"),
        (stand_in(), stand_in("cpu"), (), "different devices"),
        (stand_in(), stand_in(), (16, 24), "a multiple of 16"),
        (stand_in(), stand_in(), (16, 32), None),
    ],
)
def test_the_reason_is_named(x, other, sizes, reason, programs_run_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = launching.unsuitable(x, other, sizes=sizes)
    assert found is None if reason is None else reason in found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if x.is_cuda:
        assert "older than compute capability 8.0" in launching.unsuitable(x, other, sizes=sizes)


def test_a_dtype_without_kernels_runs_plainly_and_is_said_once(programs_run_here, caplog):
    _noted.clear()
    model = tiny("llama-gqa", dtype=torch.float64)
    for block in model.model.layers:
        for layer, name in ((block.self_attn, "o_proj"), (block.mlp, "gate_proj"), (block.mlp, "up_proj")):
            m, n = layer.get_submodule(name).weight.shape
            B, A = torch.randn(m, 5).double(), torch.randn(5, n).double()
            setattr(layer, name, LowRank(B, A).module())
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
        set_runtime(model, "triton")
        with caplog.at_level(logging.DEBUG, "corank.runtime"):
            for _ in range(2):
                torch.testing.assert_close(model(ids).logits, expected)
    said = [record.message for record in caplog.records if "float64" in record.message]
    assert len(said) == len(set(said)) >= 1 and all(record.levelno == logging.DEBUG for record in caplog.records)


def test_dtypes_that_differ_and_columns_first_are_not_taken(programs_run_here):
    x, A, B, bias = linear_case(3, 32, 16, 48)
    assert supports_lowrank_linear(x, A, B, bias) is None
    assert "different dtypes" in supports_lowrank_linear(x.half(), A, B, bias)
    assert "row by row" in supports_lowrank_linear(x, A.T.contiguous().T, B, bias)


def test_choices_measured_with_another_gpu_or_version_are_not_taken(tmp_path):
    table = Table(tmp_path)
    kept = {"stamp": stamp(CPU), "entries": {"key": {"choice": "packed", "seconds": {"torch": 2.0, "packed": 1.0}}}}
    table.path(CPU).write_text(json.dumps(kept))
    assert table.entries(CPU) == kept["entries"]
    for name in kept["stamp"]:
        other = {**kept["stamp"], name: "NVIDIA H300" if name == "device" else "99"}
        table.path(CPU).write_text(json.dumps({**kept, "stamp": other}))
        assert Table(tmp_path).entries(CPU) == {}, name


CASES = {
    "lowrank_linear": (lowrank_linear, lowrank_linear_twin, lambda T: linear_case(T, 6, 3, 4)),
    "lowrank_mlp": (lowrank_mlp, lowrank_mlp_twin, lambda T: mlp_case(T, 6, 9, (2, 3, 2))),
    "pivot_linear": (pivot_linear, pivot_linear_twin, lambda T: pivot_case(T, 6, 3, 9)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_operation_takes_any_number_of_tokens(name):
    op, twin, case = CASES[name]
    compiled_times = []

    def backend(graph, inputs):
        compiled_times.append(1)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a) * 2, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (7, 5, 11, 70):  # at first unlike any other size, which it would be taken for
        torch.testing.assert_close(compiled(*case(tokens)), 2 * twin(*case(tokens)))
    assert len(compiled_times) == 1


@pytest.mark.parametrize("runtime", ["chunked", "packed", "triton", "flashsvd"])
def test_a_compiled_model_takes_any_length(runtime):
    model = tiny("llama-gqa")
    del model.model.layers[1:]
    for name in ("gate_proj", "up_proj", "down_proj"):
        m, n = model.model.layers[0].mlp.get_submodule(name).weight.shape
        setattr(model.model.layers[0].mlp, name, LowRank(torch.randn(m, 5) / 5, torch.randn(5, n) / 5).module())
    batches = [torch.randint(3, 60, size) for size in ((2, 7), (2, 11), (3, 23))]
    with torch.no_grad():
        expected = [model(ids).logits for ids in batches]
        set_runtime(model, runtime)
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=True, backend="eager")
        for ids, due in zip(batches, expected, strict=True):
            torch.testing.assert_close(compiled(ids).logits, due, rtol=1e-4, atol=1e-4)
