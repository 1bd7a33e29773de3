from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

from corank.errors import CorankError
from corank.evaluate import PeakMemory, memory

MIB = 1 << 20
needs_proc = pytest.mark.skipif(memory.resident_bytes() is None, reason="no /proc")


@needs_proc
def test_a_buffer_freed_inside_the_block_is_seen():
    gc.collect()
    with PeakMemory() as peak:
        buffer = torch.ones(96 * MIB // 4)
        time.sleep(0.05)
        del buffer
    # Freed memory of earlier tests may be used again: most of the buffer must show, not all.
    assert peak.grown_bytes > 48 * MIB
    assert peak.peak_bytes >= peak.start_bytes > 0 and peak.exact
    with PeakMemory() as idle:
        pass
    assert idle.grown_bytes < 16 * MIB


@needs_proc
def test_each_block_has_its_own_peak():
    memories = []
    for size in (128, 8):
        with PeakMemory() as peak:
            buffer = torch.ones(size * MIB // 4)
            time.sleep(0.05)
            del buffer
        memories.append(peak.grown_bytes)
    assert memories[1] < memories[0] - 48 * MIB


def test_a_spike_between_samples_is_caught_by_the_high_water_mark(monkeypatch):
    marks = iter([500, 900])
    monkeypatch.setattr(memory, "resident_bytes", lambda: 400)
    monkeypatch.setattr(memory, "high_water_bytes", lambda: next(marks))
    with PeakMemory() as peak:
        pass
    assert (peak.start_bytes, peak.peak_bytes, peak.grown_bytes) == (400, 900, 500)


def test_an_old_high_water_mark_is_not_this_block(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: 400)
    monkeypatch.setattr(memory, "high_water_bytes", lambda: 900)
    with PeakMemory() as peak:
        pass
    assert (peak.peak_bytes, peak.exact) == (400, True)


def test_without_proc_the_peak_of_the_process_is_given_and_said_so(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: None)
    monkeypatch.setattr(memory, "high_water_bytes", lambda: 900)
    with PeakMemory() as peak:
        pass
    assert (peak.peak_bytes, peak.exact) == (900, False)


def test_the_thread_ends_even_when_the_block_fails():
    with pytest.raises(KeyError), PeakMemory(interval=0.001):
        raise KeyError
    assert not [t for t in threading.enumerate() if t.name == "corank-peak-memory"]


def test_the_readings_are_bytes_of_this_process():
    resident = memory.resident_bytes()
    assert resident is None or 10 * MIB < resident
    assert memory.high_water_bytes() > 10 * MIB


@pytest.mark.parametrize("interval", [0, -1.0, float("nan")])
def test_bad_interval(interval):
    with pytest.raises(CorankError, match="interval"):
        PeakMemory(interval)
