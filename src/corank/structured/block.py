"""A block as the driver hands it to what narrows it, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PretrainedConfig

from corank.engine.stream import Observer, Stream
from corank.model.site import Site
from corank.structured.sensitivity import Sums
from corank.structured.shape import BlockShape

if TYPE_CHECKING:
    from corank.structured.recipe import Structured


@dataclass(frozen=True)
class Block:
    """One block of the model, with its weights in memory.

    Attributes:
        layer: its number in the source.
        module: the block itself; whoever narrows it changes it in place.
        sites: its matrices, in the order in which it runs them.
        prefix: its path with a dot at the end; ``site.name.removeprefix(prefix)`` is the path inside `module`.
        shape: its widths as it is.
        config: of the model.
        stream: the activations that enter it, in batches: those of the dense model, or, for a sequential recipe, those
            that the narrowed blocks before it have made; None if the recipe measures nothing.
        recipe: what to do.
        seed: of everything random.
        dense: the activations that enter it in the dense model, for a recipe that is anchored; else None.
        sensitivity: name of a matrix -> what its rows and columns mean for the loss, for score=taylor.
        passed: what the block as it came made of each batch, once it has been observed by a recipe that is not sequential.
    """

    layer: int
    module: nn.Module
    sites: list[Site]
    prefix: str
    shape: BlockShape
    config: PretrainedConfig
    stream: Stream | None
    recipe: Structured
    seed: int = 0
    dense: Stream | None = None
    sensitivity: Sums = field(default_factory=dict)
    passed: list[Tensor] = field(default_factory=list)

    def path(self, site: Site) -> str:
        """Path of a matrix inside the module."""
        return site.name.removeprefix(self.prefix)

    def role(self, role: str) -> list[Site]:
        """Matrices with a role, in order; none if the block has no such."""
        return [s for s in self.sites if s.role == role]

    def observe(self, observers: Mapping[str, Observer], stop: bool = False) -> None:
        """Run the block, as `module` now is, on all calibration data.

        Args:
            observers: path inside the module -> called with the input [batch, tokens, n] of that submodule and the mask
                [batch, tokens] of real tokens (or None), batch by batch.
            stop: end each forward pass once the last of them has been seen.
        """
        assert self.stream is not None, "the recipe names no statistics"
        whole = not self.recipe.sequential and not self.passed  # what comes out is wanted later anyway
        for i in range(len(self.stream)):
            made = self.stream.observe(self.module, self.layer, i, observers, stop=stop and not whole)
            if whole and made is not None:
                self.passed.append(made)

    def outputs(self) -> list[Tensor]:
        """What the block, as `module` now is, makes of each batch: [batch, tokens, d]."""
        assert self.stream is not None, "the recipe names no statistics"
        return [self.stream.run(self.module, self.layer, i) for i in range(len(self.stream))]


@dataclass(frozen=True)
class Narrowed:
    """What became of a block.

    Attributes:
        shape: its widths now.
        losses: name of a site -> ``||Y - Y'|| / ||Y||`` of its output on calibration data, where that is known.
    """

    shape: BlockShape
    losses: Mapping[str, float] = field(default_factory=dict)
