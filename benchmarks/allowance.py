"""Time for a benchmark: shares of a whole, and an end that comes whatever is being computed."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator

Clock = Callable[[], float]


class OutOfTime(BaseException):
    """The time of `within` is over. No `Exception`, so that nobody takes it for a failure of their own and goes on."""


class Allowance:
    """Seconds that may be taken.

    Args:
        seconds: from now on; None: as many as it takes.
        clock: seconds.
    """

    def __init__(self, seconds: float | None = None, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.end = math.inf if seconds is None else clock() + seconds

    @property
    def left(self) -> float:
        """Seconds left, not below 0."""
        return max(self.end - self.clock(), 0.0)

    def part(self, share: float) -> Allowance:
        """A share of what is left, from now on; what is not used of it stays with the whole."""
        return Allowance(None if math.isinf(self.end) else share * self.left, self.clock)

    def describe(self) -> str:
        """In words."""
        return "as long as it takes" if math.isinf(self.end) else f"at most {self.left:.0f} s"


@contextlib.contextmanager
def within(allowance: Allowance) -> Iterator[None]:
    """Raise `OutOfTime` in what runs inside when the time is over; may be nested.

    It needs the main thread and a system that has SIGALRM; without them nothing is interrupted.

    Raises:
        OutOfTime: the time is over.
    """
    seconds = allowance.left
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if math.isinf(seconds) or not able:
        yield
        return

    def over(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    began = time.monotonic()
    if outer and outer < seconds:  # what is around ends earlier
        signal.setitimer(signal.ITIMER_REAL, outer)
    try:
        yield
    finally:
        rest = max(outer - (time.monotonic() - began), 1e-3) if outer else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, rest)
