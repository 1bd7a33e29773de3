"""An order: everything that was asked for, checked before a model is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from corank.budget import Budget
from corank.engine.job import Job
from corank.engine.world import ALONE, World
from corank.errors import CorankError
from corank.evaluate.perplexity import adds_bos
from corank.model import (
    Calibration,
    Examples,
    ResidentModel,
    Source,
    Text,
    calibration,
    prompted,
    read_text,
    select_sites,
)
from corank.probing import training
from corank.recipe import Recipe, get
from corank.structured.recipe import Structured
from corank.structured.task import Task
from corank.timing import Clock, find_device

Data = str | Path | Text | Examples | Sequence[Source] | Sequence[Mapping[str, Any]]
"""Calibration data: a source of text, several to be mixed in equal shares, or batches of model inputs."""


def _calibration_data(data: Data) -> Text | Examples:
    if isinstance(data, Text | Examples):
        return data
    if isinstance(data, str | Path) or (data and all(isinstance(item, str | Path | Text) for item in data)):
        return read_text(data)  # type: ignore[arg-type]
    return Examples.of(data)  # type: ignore[arg-type]


def _check_timed(method: str, recipe: Recipe | Structured) -> None:
    """A budget of time needs an allocator that goes by the costs of the curves it is given."""
    if not isinstance(recipe, Recipe):
        raise CorankError(f"{method} takes blocks or widths away, which is not chosen by time; give keep=... instead.")
    if recipe.rule is not None:
        raise CorankError(f"{method} has a rank rule of its own; for a budget of time set allocate=lagrange.")
    if recipe.share != "none":
        raise CorankError(f"share={recipe.share} is chosen by parameters; a budget of time needs share=none.")
    if recipe.families not in ("factorize", "auto"):
        raise CorankError(
            f"families={recipe.families} is chosen by parameters; a budget of time needs families=factorize."
        )
    if recipe.allocate in training.FAMILIES:
        raise CorankError(f"allocate={recipe.allocate} learns sizes; a budget of time needs another, such as lagrange.")


@dataclass(frozen=True)
class Order:
    """What was asked for, checked: everything that defines a run besides the model.

    Attributes:
        method: name of the method.
        settings: all its parameters and the common fields that were set.
        recipe: built from them.
        budget: None if the recipe has a rank rule of its own and no budget was given.
        text: calibration text or examples, None if the recipe measures nothing.
        example: model inputs of the shapes that a model of something else than text takes, None for text.
        samples, length, seed, batch: of the calibration.
    """

    method: str
    settings: dict[str, Any]
    recipe: Recipe | Structured
    budget: Budget | None
    text: Text | Examples | None
    example: Mapping[str, Any] | None = None
    samples: int = 64
    length: int = 512
    seed: int = 0
    batch: int = 8

    @classmethod
    def take(
        cls,
        method: str,
        budget: Mapping[str, Any],
        scope: str | None,
        settings: Mapping[str, Any],
        data: Data,
        **rest: Any,
    ) -> Order:
        """Check everything that can be checked without the model.

        Raises:
            CorankError: unknown names, values out of range, no budget where one is needed, unreadable text.
        """
        entry = get(method)
        recipe = entry.recipe(**settings)
        given = any(value is not None for value in budget.values())
        size = budget.get("params") is not None or budget.get("bytes") is not None
        scope = scope or ("model" if size else "sites")
        limit = Budget.parse(**budget, scope=scope) if given or recipe.needs_budget else None
        if limit is not None and limit.latency is not None:
            _check_timed(method, recipe)
            if recipe.families == "auto":
                recipe = recipe.overridden({"families": "factorize"})  # widths are chosen by parameters
        is_text = isinstance(data, str | Path | Text)
        found = _calibration_data(data) if recipe.needs_text or not is_text else None
        example = found.items[0] if isinstance(found, Examples) else None
        text = found if recipe.needs_text else None
        return cls(method, {**entry.parameters, **settings}, recipe, limit, text, example, **rest)

    def identity(self) -> dict[str, Any]:
        """The order as JSON; two orders with the same identity give the same result on the same model."""
        return {
            "method": self.method,
            "parameters": {k: str(v) for k, v in self.settings.items()},
            "budget": self.budget.to_dict() if self.budget else {},
            "data": self.text.sha256 if self.text else None,
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
        }

    def windows(self, tokenizer: Any) -> Calibration | None:
        """The calibration data as a model takes them, None if the recipe measures nothing.

        Raises:
            CorankError: a text too short, or no tokenizer for it.
        """
        if self.text is None or isinstance(self.text, Examples):
            return None if self.text is None else self.text.calibration()
        if tokenizer is None:
            raise CorankError("Give tokenizer=..., which calibration needs.")
        return calibration(tokenizer, self.text, self.samples, self.length, self.seed, bos=adds_bos(tokenizer))

    def aligned(self, dtype: torch.dtype, world: World = ALONE) -> Order:
        """The same with a number for ``multiple_of=auto``, so that reports and recipes say which it was.

        It is the quantum of the device that a budget of time is for, else of this machine: see
        :func:`corank.timing.measure_quantum`.

        Args:
            dtype: of the weights.
            world: the processes of the run; the first one measures.
        """
        if not isinstance(self.recipe, Recipe) or self.recipe.multiple_of:
            return self
        where = self.budget.latency_device if self.budget is not None else None
        quantum = world.from_first(lambda: find_device(where, dtype).quantum)
        recipe = self.recipe.overridden({"multiple_of": quantum})
        return replace(self, recipe=recipe, settings={**self.settings, "multiple_of": quantum})

    def job(self, source: ResidentModel, tokenizer: Any, sink: Any, dtype: torch.dtype, **rest: Any) -> Job:
        """The engine's job for a model.

        Raises:
            CorankError: unknown sites, a text too short, a budget below what is not compressed.
        """
        assert isinstance(self.recipe, Recipe)
        world = rest.get("world", ALONE)
        plan = source.outline
        sites = select_sites(plan.sites, self.recipe.targets, self.recipe.ignore, plan.optional)
        data = self.windows(tokenizer)
        heldout = None
        if self.recipe.looks and isinstance(self.text, Text) and data is not None:
            heldout = self._held_out(tokenizer, data, self.recipe.probe_windows)
        recipe: Any = self.aligned(dtype, world).recipe
        limit, clock = None, None
        if self.budget is not None and self.budget.latency is not None:
            where = self.budget.latency_device
            device = world.from_first(lambda: find_device(where, dtype))  # no two measurements are alike
            clock = Clock(device, self.budget.latency_batch, self.budget.latency_tokens)
            limit = clock.limit(sites, self.budget.latency)
            if recipe.multiple_of == 1:
                recipe = recipe.overridden({"multiple_of": device.quantum})
        elif self.budget is not None:
            inside = sum(s.numel for s in sites)
            limit = self.budget.limit(inside, source.outline.parameters - inside, dtype.itemsize * 8)
        rest |= {"heldout": heldout, "clock": clock}
        return Job(source, recipe, sites, limit, data, sink, dtype, seed=self.seed, batch=self.batch, **rest)

    def task(self, source: ResidentModel, tokenizer: Any, dtype: torch.dtype, **rest: Any) -> Task:
        """The same for a method that takes away blocks or narrows them.

        Raises:
            CorankError: the model is no chain of blocks, a text too short, protected blocks that it does not have.
        """
        assert isinstance(self.recipe, Structured) and self.budget is not None
        data = self.windows(tokenizer)
        if data is not None and self.recipe.prompt and not data.examples:
            data = prompted(tokenizer, data, self.recipe.prompt)
        return Task(source, self.recipe, self.budget, data, dtype, seed=self.seed, batch=self.batch, **rest)

    def _held_out(self, tokenizer: Any, data: Calibration, count: int) -> Calibration:
        """Windows that were not drawn for calibration; some of those that were, if the text has no others."""
        assert isinstance(self.text, Text)
        fresh: list[int] = []
        with contextlib.suppress(CorankError):  # a longer draw holds the same windows, of every text of a mixture
            drawn = self.samples + count
            more = calibration(tokenizer, self.text, drawn, self.length, self.seed, bos=adds_bos(tokenizer))
            seen = set(map(tuple, data.ids.tolist()))
            fresh = [i for i, window in enumerate(more.ids.tolist()) if tuple(window) not in seen]
        if fresh:
            return Calibration(more.ids[fresh], None, more.source)
        return Calibration(data.ids[:: max(len(data.ids) // count, 1)][:count], None, data.source)
