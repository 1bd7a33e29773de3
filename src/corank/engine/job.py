"""What the engine is asked to do, and where finished blocks go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from corank.engine.site import Replacement
from corank.engine.world import ALONE, World
from corank.model import Calibration, ResidentModel, Site
from corank.recipe import Recipe
from corank.statistics import STATISTICS
from corank.timing import Clock


class Sink(Protocol):
    """Takes finished blocks. `done` says whether a block need not be made again."""

    def done(self, layer: int) -> list[dict[str, Any]] | None:
        """Report rows of a block that is finished already, else None."""

    def put(self, layer: int, block: nn.Module, replacements: list[Replacement], rows: list[dict[str, Any]]) -> None:
        """Take a block whose layers have been replaced."""


@dataclass
class Job:
    """One compression.

    Attributes:
        source: the model, resident or streamed.
        recipe: what to do.
        sites: the matrices to compress.
        limit: parameters allowed over the sites, None if the recipe's own rule needs no budget; with a clock, nanoseconds.
        data: calibration windows, None if the recipe measures nothing.
        sink: where finished blocks go.
        work: directory of the run (resumable), None to keep nothing.
        cache: directory of statistics to use and to fill, shared between runs on the same model and data.
        seed: of everything random.
        batch: sequences per forward pass.
        report: called with (layer, stage, relative error or None).
        world: the processes that share the work.
        heldout: windows on which an allocator that looks at the model judges it.
        scored: components in the order in which a score map gives them up (`corank.gates.components.Scored`), once they are
            chosen by one.
        clock: what counts the cost of a rank in time; None: parameters are counted.
    """

    source: ResidentModel
    recipe: Recipe
    sites: list[Site]
    limit: int | None
    data: Calibration | None
    sink: Sink
    dtype: torch.dtype
    work: Path | None = None
    cache: Path | None = None
    seed: int = 0
    batch: int = 8
    report: Callable[[int, str, float | None], None] = lambda layer, stage, error: None
    stages: dict[str, float] = field(default_factory=dict)
    scratch: Path | None = None
    world: World = ALONE
    heldout: Calibration | None = None
    clock: Clock | None = None
    scored: Any = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage's total."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def in_layer(self, layer: int) -> list[Site]:
        """Sites to compress in a block, in the order in which it runs them."""
        return [s for s in self.sites if s.layer == layer]

    @property
    def layers(self) -> int:
        """Number of visits: one to each block, and one to what lies around them if that is asked for."""
        return self.source.outline.layers + any(s.outside and s.layer for s in self.sites)

    @property
    def needs_curves(self) -> bool:
        """Whether ranks are chosen by what the sites would lose, which is measured beforehand then."""
        return self.recipe.rule is None and (self.recipe.allocate != "uniform" or self.recipe.share == "auto")

    @property
    def keeps_spectra(self) -> bool:
        """Whether decompositions are used twice: for the choice of ranks and for the factors, or by another run."""
        return self.needs_curves or self.cache is not None

    @property
    def of_inputs(self) -> set[str]:
        """Statistics of the recipe that need a forward pass."""
        return set(self.recipe.statistics) - self.of_gradients

    @property
    def of_gradients(self) -> set[str]:
        """Statistics of the recipe that need a backward pass."""
        return {n for n in self.recipe.statistics if "gradients" in STATISTICS[n].needs}
