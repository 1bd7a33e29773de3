from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from corank.errors import CorankError
from corank.report import Bar


def console(terminal: bool, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def run(bar: Bar, layers: int) -> str:
    with bar:
        for layer in range(layers):
            bar.update(layer, "measure")
            bar.update(layer, "factorize", error=0.25 / (layer + 1))
    return bar.console.file.getvalue()


@pytest.mark.parametrize(("layers", "lines"), [(100, 10), (30, 10), (4, 4), (1, 1)])
def test_a_log_gets_a_line_per_tenth(layers, lines):
    text = run(Bar(layers, console=console(False), description="svd-llm"), layers)
    shown = text.splitlines()
    assert len(shown) == lines and "\x1b" not in text and "\r" not in text
    done = [tuple(map(int, re.search(r"layer (\d+)/(\d+)", line).groups())) for line in shown]
    assert done == sorted(set(done)) and done[-1] == (layers, layers)
    assert all(line.startswith("svd-llm ") and "peak " in line for line in shown)


def test_a_line_has_stage_error_memory_and_times():
    text = run(Bar(10, console=console(False)), 10)
    first, *_, last = text.splitlines()
    assert re.fullmatch(r" 10%  layer 1/10  measure  error 0\.25  peak [\d.,]+ [KMG]iB  .+, .+ left", first)
    assert re.fullmatch(r"100%  layer 10/10  done  error 0\.025  peak [\d.,]+ [KMG]iB  [\d.]+ m?s", last)


def test_a_terminal_gets_a_live_line():
    text = run(Bar(3, console=console(True), description="svd-llm"), 3)
    last = [line for line in re.split(r"[\r\n]", text) if "svd-llm" in line][-1]
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", last)
    assert "(3/3)" in last and "done" in last and "error 0.083" in last and "peak" in last


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_silent(terminal):
    assert run(Bar(20, console=console(terminal), quiet=True), 20) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_is_not_called_done(terminal):
    bar = Bar(10, console=console(terminal))
    with pytest.raises(KeyError), bar:
        bar.update(2, "measure")
        raise KeyError
    assert "done" not in bar.console.file.getvalue()


def test_nothing_to_do_is_fine_and_a_bar_can_be_used_again():
    bar = Bar(0, console=console(False))
    assert "layer 0/0  done" in run(bar, 0)
    with pytest.raises(CorankError, match="-1 layers"):
        Bar(-1)
    bar = Bar(2, console=console(False))
    assert len(run(bar, 2).splitlines()) == 2
    assert len(run(bar, 2).splitlines()) == 4
