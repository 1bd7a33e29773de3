"""What a structured method is asked to do to a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch

from corank.budget import Budget
from corank.errors import CorankError
from corank.model import Calibration, Outline, ResidentModel, Site
from corank.structured.recipe import Structured
from corank.structured.sensitivity import Sums, first_order


@dataclass
class Task:
    """One compression.

    Attributes:
        source: the model, resident or streamed.
        recipe: what to do.
        budget: the size that was asked for.
        data: calibration windows, None if the recipe measures nothing.
        dtype: of the stored weights.
        seed: of everything random.
        batch: sequences per forward pass.
        report: called with (layer, stage, None).
        stages: stage -> seconds.

    Raises:
        CorankError: the model is not a chain of blocks.
    """

    source: ResidentModel
    recipe: Structured
    budget: Budget
    data: Calibration | None
    dtype: torch.dtype
    seed: int = 0
    batch: int = 8
    report: Callable[[int, str, float | None], None] = lambda layer, stage, error: None
    stages: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source.outline.whole and not folds_convolutions(self.recipe, self.source.outline):
            raise CorankError(
                f"{type(self.source.model).__name__} does not run as one chain of blocks, so none of them can be taken away "
                "or narrowed on its own; use a method that factorizes matrices, such as svd-llm."
            )
        self.recipe.protected(self.layers)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage's total."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    @cached_property
    def sensitivity(self) -> Sums:
        """What removing weights would change to first order, if the recipe's score asks for it; measured once."""
        if self.recipe.score != "taylor":
            return {}
        with self.stage("gradients"):
            return first_order(self.source, self.data, self.batch)

    @property
    def layers(self) -> int:
        """Blocks of the source."""
        return self.source.outline.layers

    @property
    def whole(self) -> bool:
        """Whether the budget counts the whole model, norms and embeddings included."""
        return self.budget.scope == "model"

    def sites(self, layer: int) -> list[Site]:
        """Matrices of a block, in the order in which it runs them."""
        return self.source.outline.in_layer(layer)

    @cached_property
    def around(self) -> list[int]:
        """For each block, parameters that are no matrices (norms, biases), where the budget counts them."""
        if not self.whole:
            return [0] * self.layers
        plan = self.source.outline
        blocks = [self.source.model.get_submodule(plan.path(i)) for i in range(self.layers)]
        return [
            sum(p.numel() for p in block.parameters()) - sum(s.numel for s in self.sites(i))
            for i, block in enumerate(blocks)
        ]

    @cached_property
    def costs(self) -> list[int]:
        """What each block counts in the budget."""
        return [sum(s.numel for s in self.sites(i)) + self.around[i] for i in range(self.layers)]

    @cached_property
    def limit(self) -> int:
        """What the blocks may count together.

        Raises:
            CorankError: the rest of the model alone is larger than the budget.
        """
        inside = sum(self.costs)
        return self.budget.limit(inside, self.source.outline.parameters - inside, self.dtype.itemsize * 8)


def folds_convolutions(recipe: Structured, outline: Outline) -> bool:
    """Whether a recipe that folds is given a convolutional network."""
    kernels = sum(s.numel for s in outline.sites if s.form == "conv")
    return recipe.compensate == "cluster" and 2 * kernels > sum(s.numel for s in outline.sites)
