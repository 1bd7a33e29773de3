"""Figures of a device: kept per device, dtype, threads and version, and never used for another."""

from __future__ import annotations

import json

import pytest
import torch

from corank.errors import CorankError
from corank.timing import PRESETS, Bound, Device, find_device, measure_device, this_device
from corank.timing import device as module


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A cache of its own, and how often something was measured."""
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path))
    calls = []

    def stand_in(device, dtype):
        calls.append((str(device), dtype))
        key = {"name": module.device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        return Device(dtype=str(dtype)[6:], bytes_per_s=1e9 * len(calls), flops_per_s=1e10, kernel_s=1e-6, **key)

    monkeypatch.setattr(module, "measure_device", stand_in)
    return calls


def test_it_is_measured_once_per_device_dtype_threads_and_version(measured, monkeypatch, tmp_path):
    first = this_device("cpu", torch.float32)
    assert this_device("cpu", torch.float32) == first == find_device("cpu", torch.float32) and len(measured) == 1
    assert this_device("cpu", torch.bfloat16).dtype == "bfloat16" and len(measured) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert this_device("cpu", torch.float32).threads == 7 and len(measured) == 3
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert this_device("cpu", torch.float32).torch == "99.0" and len(measured) == 4
    monkeypatch.setattr(module, "device_name", lambda device: "another processor")
    assert this_device("cpu", torch.float32).name == "another processor" and len(measured) == 5
    assert len(list((tmp_path / "devices").iterdir())) == 5


@pytest.mark.parametrize("change", [{"name": "another"}, {"torch": "0.1"}, {"quanta": 3}, {"bytes_per_s": -1.0}, None])
def test_figures_that_are_not_of_this_device_are_ignored(measured, tmp_path, change):
    this_device("cpu", torch.float32)
    (file,) = (tmp_path / "devices").iterdir()
    file.write_text("{" if change is None else json.dumps({**json.loads(file.read_text()), **change}))
    assert this_device("cpu", torch.float32).bytes_per_s == 2e9 and len(measured) == 2
    assert this_device("cpu", torch.float32).bytes_per_s == 2e9 and len(measured) == 2


def test_devices_that_one_may_not_have():
    h200 = find_device("h200", torch.float32)
    assert h200 is PRESETS["h200"] and h200.assumed and h200.itemsize == 2 and h200.quantum == 64
    assert Device.from_json(json.loads(json.dumps(h200.to_json()))) == h200


def test_a_file_describes_a_device(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**PRESETS["h200"].to_json(), "name": "mine", "kernel_s": 1e-6}))
    assert find_device(str(file)).name == "mine"
    file.write_text('{"name": "mine"}')
    with pytest.raises(CorankError, match="does not describe a device"):
        find_device(str(file))
    with pytest.raises(CorankError, match="no file"):
        find_device(str(tmp_path / "none.json"))


def test_unknown_devices_are_refused():
    with pytest.raises(CorankError, match="nearest: h200"):
        find_device("h20")
    if not torch.cuda.is_available():
        with pytest.raises(CorankError, match="no GPU to measure.*h200"):
            find_device("cuda")


def test_a_measurement_fills_every_figure():
    found = measure_device("cpu", torch.float32, size=64)
    assert found.dtype == "float32" and found.threads == torch.get_num_threads() and found.torch == torch.__version__
    assert found.bytes_per_s > 0 and found.flops_per_s > 0 and found.kernel_s > 0 and found.launch_s == 0
    assert (
        found.quantum in module.QUANTA and found.name == module.device_name(torch.device("cpu")) and not found.assumed
    )


def test_the_quantum_is_the_smallest_that_is_as_fast_as_any(monkeypatch):
    def choose(seconds_per_unit):
        times = iter([seconds_per_unit[q] * (1024 + q) for q in module.QUANTA])
        monkeypatch.setattr(module, "best", lambda work, device: next(times))
        return module.measure_quantum(torch.device("cpu"), torch.float32, width=2048)

    assert choose({1: 1.0, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0}) == 1
    assert choose({1: 1.3, 8: 1.2, 16: 1.2, 32: 1.01, 64: 1.0}) == 32
    assert choose({1: 1.3, 8: 1.2, 16: 1.2, 32: 1.2, 64: 1.0}) == 64
    assert choose({1: 1.02, 8: 1.0, 16: 1.01, 32: 1.0, 64: 1.0}) == 1


def test_a_roofline_and_a_launch():
    device = Device("x", "float32", bytes_per_s=1e9, flops_per_s=1e10, kernel_s=1e-3)
    assert device.seconds(1e10, 1) == pytest.approx(1.001) and device.seconds(1, 2e9, launches=3) == pytest.approx(
        2.003
    )
    assert Bound(1e10, 1e9, "cpu", "float32", 1).seconds(1e10, 1) == device.roofline(1e10, 1)
