"""What a way to heal is, and what it is given. Each way is one file of `corank.heal.ways`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import nn

from corank.engine.world import ALONE, World
from corank.errors import CorankError, unknown
from corank.heal.training import History, Schedule
from corank.model import Calibration, ResidentModel

Progress = Callable[[str, int, int, float], None]
"""Called with (what, done, of, loss on held-out sequences)."""


@dataclass(frozen=True)
class Case:
    """One model to heal.

    Attributes:
        student: the compressed model, in memory, changed in place.
        teacher: the dense one, resident or streamed.
        data: sequences.
        learned, heldout: indices of the sequences to learn from, and to judge by.
        what: which parameters train, a key of `corank.heal.parameters.WHAT` that the way allows.
        schedule: how long and how fast.
        top: tokens of the teacher's predictions that are kept.
        work: directory to continue from, None: not resumable.
        progress: of training.
        world: the processes that share the work.
    """

    student: ResidentModel
    teacher: ResidentModel
    data: Calibration
    learned: list[int]
    heldout: list[int]
    what: str
    schedule: Schedule
    top: int = 256
    work: Path | None = None
    progress: Progress = lambda what, done, of, value: None
    world: World = ALONE

    def state(self, name: str) -> Path | None:
        """File of the working directory, None without one."""
        return None if self.work is None else self.work / name


@dataclass(frozen=True)
class Way:
    """A way to heal.

    Attributes:
        summary: what learns what, in one line.
        run: does it, in place, and says what happened: one history, or several, one after the other.
        parameters: all that may change, by name; everything else stays as it is, to the bit.
        what: the choices of `Case.what` it allows; the first is its own.
        measure: what the loss on the held-out sequences is, for people.
        learning_rate: that it is known to work with.
        local: it compares matrices or blocks with those of the dense model, which must have the same ones.
        by_blocks: every history is that of another block.
        trained: how many values train, where these are not the parameters themselves (adapters).
    """

    summary: str
    run: Callable[[Case], list[History]]
    parameters: Callable[[Case], Mapping[str, nn.Parameter]]
    what: tuple[str, ...] = ("blocks", "factors", "matrices")
    measure: str = "nats per token from the dense model"
    learning_rate: float = 1.5e-5
    local: bool = False
    by_blocks: bool = False
    trained: Callable[[Case], int] | None = None


@cache
def list_ways() -> dict[str, Way]:
    """All ways to heal, by name, in alphabetical order: those of the files of `corank.heal.ways`."""
    package = importlib.import_module("corank.heal.ways")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {n.replace("_", "-"): importlib.import_module(f"corank.heal.ways.{n}").WAY for n in names}


def way(name: str) -> Way:
    """The way of this name.

    Raises:
        CorankError: there is none; the nearest names are suggested.
    """
    if name not in list_ways():
        raise unknown("way to heal", name, list_ways())
    return list_ways()[name]


def what_of(how: str, what: str | None) -> str:
    """The choice of what to train: the way's own where none is given.

    Raises:
        CorankError: an unknown way or choice, or one that the way does not allow.
    """
    from corank.heal.parameters import require_what

    allowed = way(how).what
    if what is None:
        return allowed[0]
    require_what(what)
    if what not in allowed:
        raise CorankError(
            f"{how} trains {' or '.join(allowed)}, not {what}; leave that choice out, or name one of them."
        )
    return what
