"""Progress over the layers of a model: a live line on a terminal, a line per tenth in a log, or silence."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from corank.errors import CorankError
from corank.evaluate.memory import high_water_bytes
from corank.report import numbers


def progress(console: Console | None = None) -> Progress:
    """A rich Progress: layer (i/N), stage, relative error, peak memory, elapsed, time left.

    Its tasks need the fields ``stage`` (str), ``error`` (float or None) and ``started``
    (``time.monotonic()``); :class:`Bar` keeps them.
    """
    console = console or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=max(4, min(30, console.width - 84))),
        _Cell("layer"),
        _Cell("stage"),
        _Cell("error"),
        _Cell("peak"),
        _Cell("time"),
        console=console,
    )


class Bar:
    """Context manager that shows how far a run over ``total`` layers is.

    On a terminal it is one live line; elsewhere a line is printed each time another tenth of the layers is
    done; with ``quiet`` nothing is. Example::

        with Bar(len(layers), description="svd-llm") as bar:
            for i, layer in enumerate(layers):
                bar.update(i, "measure")
                bar.update(i, "factorize", error=0.031)
    """

    def __init__(
        self,
        total: int,
        *,
        console: Console | None = None,
        quiet: bool = False,
        description: str = "",
        unit: str = "layer",
    ) -> None:
        """Args: total: layers (or other units), >= 0. console: None for standard error. description: leads the line."""
        if total < 0:
            raise CorankError(f"A run over {total} layers is not possible; give 0 or more.")
        self.total = total
        self.description = description
        self.unit = unit
        self.quiet = quiet
        self.console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._started = time.monotonic()
        self._tenth = 0
        self._error: float | None = None
        self._stage = ""

    def __enter__(self) -> Bar:
        self._started = time.monotonic()
        self._tenth, self._error, self._stage = 0, None, ""
        if not self.quiet and self.console.is_terminal:
            self._live = progress(self.console)
            self._task = self._live.add_task(
                self.description, total=self.total, stage="", error=None, started=self._started
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._show(self.total, "done", self._error)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, layer: int, stage: str, error: float | None = None) -> None:
        """Say what is being done: ``layer`` from 0, so that ``layer`` layers are finished; ``error`` if
        known.

        The last error is kept until another is given.
        """
        if error is not None:
            self._error = error
        self._stage = stage
        self._show(layer, stage, self._error)

    def _show(self, done: int, stage: str, error: float | None) -> None:
        if self.quiet:
            return
        if self._live is not None:
            self._live.update(self._task, total=self.total, completed=done, stage=stage, error=error)
            return
        tenth = 10 * done // self.total if self.total else 10
        if tenth > self._tenth:
            self._tenth = tenth
            self.console.print(self._line(done, stage, error), soft_wrap=True, highlight=False, markup=False)

    def _line(self, done: int, stage: str, error: float | None) -> str:
        share = done / self.total if self.total else 1.0
        words = [f"{100 * share:3.0f}%", f"{self.unit} {done}/{self.total}", stage]
        if error is not None:
            words.append(f"error {numbers.number(error, 2)}")
        words += [f"peak {numbers.size(_peak_bytes(), 3)}", _times(time.monotonic() - self._started, share)]
        return "  ".join([self.description, *words] if self.description else words)


class _Cell(ProgressColumn):
    """One column of the live line."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def render(self, task: Task) -> Text:
        total = int(task.total or 0)
        if self.what == "layer":
            return Text(f"({min(int(task.completed) + 1, total)}/{total})")
        if self.what == "stage":
            return Text(f"{task.fields['stage']:<10}")
        if self.what == "error":
            error = task.fields["error"]
            return Text("" if error is None else f"error {numbers.number(error, 2)}", style="cyan")
        if self.what == "peak":
            return Text(f"peak {numbers.size(_peak_bytes(), 3)}", style="magenta")
        share = task.completed / total if total else 1.0
        return Text(_times(time.monotonic() - task.fields["started"], share), style="green", no_wrap=True)


def _times(elapsed: float, share: float) -> str:
    """Elapsed and left; what is left is a guess, so there is none before a first layer is done."""
    if share >= 1:
        return numbers.duration(elapsed)
    left = numbers.duration(elapsed * (1 - share) / share) if share > 0 else numbers.DASH
    return f"{numbers.duration(elapsed)}, {left} left"


def _peak_bytes() -> int:
    """Peak of this process so far: on the CUDA device in use if there is one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return high_water_bytes()
