"""The recipe of the family "structured": fewer blocks, narrower blocks, or both; the result needs no new layers.

A method is registered as those of any other family, and returns a `Structured` in place of a `Recipe`:

    @register("shortgpt", family="structured", cite="arXiv:2403.03853")
    def shortgpt() -> Structured:
        return Structured(depth=..., statistics=("influence",))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from corank.errors import CorankError, unknown

UNITS = ("channels", "heads", "qk", "vo", "residual")
LEARNED = "learned"
"""The score of units that learn to go (`Structured.learn`)."""

SCORES = ("magnitude", "wanda", "wifv", "leverage", "obs", "greedy", "lorap", "taylor", LEARNED)
LIKENESS = ("plain", "balanced")
"""What units are compared by that are averaged in clusters, in place of a score."""

REPAIRS = ("none", "weights", "data")
ROTATIONS = ("one", "each")
COMPENSATIONS = ("none", "bias", "ls", "affine-ls", "cluster")
ALLOCATIONS = ("uniform", "entropic", "z-score", "log")


@dataclass(frozen=True)
class Selection:
    """What becomes of the blocks.

    Attributes:
        removed: numbers of those that go, in the order in which they were chosen.
        mixes: for a block that stays and has others merged into it, the share of each of them (and of its own).
    """

    removed: tuple[int, ...]
    mixes: Mapping[int, Mapping[int, float]] = field(default_factory=dict)

    def kept(self, layers: int) -> tuple[int, ...]:
        """Numbers of the blocks that stay, in order."""
        return tuple(i for i in range(layers) if i not in set(self.removed))


@dataclass(frozen=True)
class Structured:
    """What a structured method does.

    Attributes:
        depth: decides which blocks go, from a `corank.structured.depth.Depth`; None: all stay.
        merge: blocks that go are merged into others in place of being dropped (`depth` says with which weights).
        units: what is removed inside the blocks that stay: "channels" of the feed-forward network, "heads" (a key-value
            head with the query heads that read it), "qk" and "vo" (dimensions of the heads),
            or, alone, "residual" (dimensions of what blocks hand on).
        score: name of the score of a unit; those with the lowest go (`corank.structured.scores`). For compensate=cluster
            "plain", or "balanced" if up and down projections are brought to the same norms first.
        compensate: what the matrices that read the removed units do about it: "none", "bias" (the mean of what is
            missing), "ls" (least squares), "affine-ls" (about the mean), "cluster" (units are averaged in clusters).
        allocate: how the budget is shared among the blocks: "uniform", "entropic" (by what they change, arXiv:2408.09632),
            "z-score" (standardised scores of all blocks, one threshold, arXiv:2312.11983), "log" (logarithmically more
            towards the end, arXiv:2412.18110).
        sequential: a block is fitted to the inputs it will really see.
        anchored: least squares aims at what the dense model's matrix puts out, from the inputs that it will really see; for
            a sequential recipe.
        statistics: what must be measured on calibration data; empty: the method needs none.
        uniform: give all blocks the same widths, so that the result is an ordinary checkpoint.
        rotations: of units=residual: "one" basis for the whole stream, or "each" place in its own, with maps between them
            (`corank.structured.maps`).
        repair: of batch norms when compensate=cluster folds convolutions (`corank.structured.convolutions`): "weights",
            "data" or "none".
        split: attention matrices are stored as two factors, with this many times the parameters of queries and keys for
            values and outputs (`corank.structured.attention`); None: they are not.
        multiple_of: the width of the feed-forward network is a multiple of this.
        protect: numbers of blocks to leave as they are; "ends" for the first and the last.
        temperature: of allocate=entropic, relative to the mean of what blocks change: large is uniform.
        cap: largest share of a block that allocate=entropic or log removes.
        ridge: relative to the mean diagonal of second moments: of leverage scores, and of everything that is solved with
            moments of fewer tokens than channels. Least squares needs none otherwise.
        learn: trains the model in memory with gates on its units, in place, and takes out those that have learned to go
            (`corank.structured.learning`); the score is then "learned".
        prompt: text that is put before every window of training text.
    """

    depth: Callable[[Any], Selection] | None = None
    merge: bool = False
    units: tuple[str, ...] = ()
    score: str = ""
    compensate: str = "none"
    allocate: str = "uniform"
    sequential: bool = False
    anchored: bool = False
    statistics: tuple[str, ...] = ()
    uniform: bool = False
    rotations: str = "one"
    repair: str = "weights"
    split: float | None = None
    multiple_of: int = 1
    protect: tuple[str, ...] = ()
    temperature: float = 1.0
    cap: float = 0.8
    ridge: float = 1e-4
    learn: Callable[..., Any] | None = None
    prompt: str = ""

    COMMON: ClassVar[tuple[str, ...]] = (
        "score",
        "compensate",
        "allocate",
        "sequential",
        "anchored",
        "uniform",
        "multiple_of",
        "protect",
        "temperature",
        "cap",
        "ridge",
    )

    def __post_init__(self) -> None:
        for unit in self.units:
            if unit not in UNITS:
                raise unknown("unit", unit, UNITS)
        if self.compensate not in COMPENSATIONS:
            raise unknown("compensation", self.compensate, COMPENSATIONS)
        if self.repair not in REPAIRS:
            raise unknown("way to repair batch norms", self.repair, REPAIRS)
        if self.rotations not in ROTATIONS:
            raise unknown("kind of rotations", self.rotations, ROTATIONS)
        known = LIKENESS if self.compensate == "cluster" else SCORES
        if "residual" in self.units:
            self._check_residual()
        elif self.units and self.score not in known:
            raise unknown(f"score for compensate={self.compensate}", self.score, known)
        self._check_learned()
        if self.compensate == "cluster" and (self.units != ("channels",) or self.allocate == "z-score"):
            raise CorankError(
                "compensate=cluster averages channels, which have no scores: leave out attention and z-score."
            )
        if self.allocate not in ALLOCATIONS:
            raise unknown("way to share the budget among blocks", self.allocate, ALLOCATIONS)
        if self.multiple_of < 1 or not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise CorankError("multiple_of must be at least 1, and temperature positive.")
        if not 0 < self.cap <= 1 or not (self.ridge >= 0 and math.isfinite(self.ridge)):
            raise CorankError("cap must be above 0 and at most 1, and ridge not negative.")
        if self.score == "taylor" and "gradient-mean" not in self.statistics:
            object.__setattr__(self, "statistics", (*self.statistics, "gradient-mean"))
        if not self.units and (self.compensate != "none" or self.allocate != "uniform" or self.multiple_of > 1):
            raise CorankError(
                "A method that takes away whole blocks has no widths: leave compensate, allocate and multiple_of alone, "
                "or use one that narrows blocks, such as flap."
            )
        if self.anchored and not (self.sequential and self.compensate in ("ls", "affine-ls")):
            raise CorankError("anchored=true needs sequential=true, and compensate=ls or affine-ls; set them as well.")
        if self.uniform and self.protect and self.units:
            raise CorankError("uniform=true narrows all blocks alike, so none can be protected; leave one of them out.")
        if self.split is not None and not (self.split > 0 and math.isfinite(self.split)):
            raise CorankError(f"The share of values and outputs is {self.split:g}; give a positive number, such as 3.")
        if self.split is not None and self.uniform:
            raise CorankError(
                "uniform=true is for an ordinary checkpoint, and attention is to be stored as factors; set attention=false "
                "as well."
            )
        if self.uniform and self.allocate != "uniform":
            # the widths are one number then, whatever the way to share them out
            object.__setattr__(self, "allocate", "uniform")
        _blocks_named(self.protect)

    def _check_residual(self) -> None:
        """Dimensions of the residual stream are principal components, of all blocks at once."""
        other = {"units": self.units[1:], "score": self.score, "protect": self.protect, "depth": self.depth}
        given = [name for name, value in other.items() if value]
        given += [
            name for name, usual in (("compensate", "none"), ("allocate", "uniform")) if getattr(self, name) != usual
        ]
        if given or self.sequential:
            what = ", ".join([*given, *["sequential"] * self.sequential])
            raise CorankError(f"The residual stream is cut in all blocks alike; leave {what} as it is.")

    def _check_learned(self) -> None:
        """What learns to go has no score, and training makes up for what is missing."""
        if (self.score == LEARNED) != (self.learn is not None):
            raise CorankError("score=learned belongs to methods that train, such as loraprune; choose one of these.")
        if self.learn is not None and (self.compensate != "none" or self.sequential or self.allocate == "z-score"):
            raise CorankError(
                "This method trains all blocks together; leave compensate and sequential as they are, and share the budget by "
                "allocate=uniform, entropic or log."
            )

    @property
    def heal(self) -> str:
        """There is no training inside compression; `corank heal` can follow."""
        return "none"

    @property
    def looks(self) -> bool:
        """Nothing is judged on held-out text."""
        return False

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration data."""
        measured = self.sequential or self.compensate in ("bias", "ls", "affine-ls")
        trained = self.learn is not None or self.repair == "data"
        return bool(self.statistics) or measured or self.allocate == "entropic" or trained

    @property
    def needs_budget(self) -> bool:
        """The number of blocks and their widths follow from the budget."""
        return True

    def overridden(self, fields: Mapping[str, Any]) -> Structured:
        """The same with some fields set."""
        return dataclasses.replace(self, **fields)

    def protected(self, layers: int) -> set[int]:
        """Numbers of the blocks to leave as they are.

        Args:
            layers: blocks of the model; negative numbers count from the end.

        Raises:
            CorankError: there is no such block.
        """
        found: set[int] = set()
        for number in _blocks_named(self.protect):
            if not -layers <= number < layers:
                raise CorankError(f"protect={number}: the model has the blocks 0 to {layers - 1}.")
            found.add(number % layers)
        return found


def _blocks_named(protect: tuple[str, ...]) -> list[int]:
    """The numbers that a setting names; "ends" is 0 and -1."""
    numbers: list[int] = []
    for item in protect:
        try:
            numbers += [0, -1] if item == "ends" else [int(item)]
        except (TypeError, ValueError):
            raise CorankError(f"protect={item!r}: give numbers of blocks, such as protect=0,1,-1, or ends.") from None
    return numbers
