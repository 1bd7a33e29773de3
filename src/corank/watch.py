"""Progress of a whole command: one bar after another."""

from __future__ import annotations

from corank.report.progress import Bar


class Watch:
    """Feeds progress bars: a new one whenever a pass over the layers begins."""

    def __init__(self, name: str, total: int, quiet: bool):
        self.name, self.total, self.quiet = name, total, quiet
        self._bar: Bar | None = None
        self._last, self._stage = -1, ""

    def __call__(self, layer: int, stage: str, error: float | None = None) -> None:
        if self._bar is None or (stage != self._stage and layer <= self._last):
            self.close()
            self._bar = Bar(self.total, quiet=self.quiet, description=f"{self.name}: {stage}").__enter__()
        self._bar.update(layer, stage, error)
        self._last, self._stage = layer, stage

    def step(self, what: str, done: int, of: int) -> None:
        """The same for work by windows of text; said once with done=0 when it begins."""
        if what != self._stage or self._bar is None:
            self.close()
            self._bar = Bar(of, quiet=self.quiet, description=what, unit="window").__enter__()
            self._stage, self._last = what, -1
        self._bar.total = of
        self._bar.update(done, "")

    def close(self) -> None:
        """Finish the bar that is open."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
