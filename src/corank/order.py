"""An order: everything that was asked for, checked before a model is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from corank.budget import Budget
from corank.engine.job import Job
from corank.errors import CorankError
from corank.evaluate.perplexity import adds_bos
from corank.model import Calibration, Examples, ResidentModel, Source, Text, calibration, read_text, select_sites
from corank.recipe import Recipe, get

Data = str | Path | Text | Examples | Sequence[Source] | Sequence[Mapping[str, Any]]
"""Calibration data: a source of text, several to be mixed in equal shares, or batches of model inputs."""


def _calibration_data(data: Data) -> Text | Examples:
    if isinstance(data, Text | Examples):
        return data
    if isinstance(data, str | Path) or (data and all(isinstance(item, str | Path | Text) for item in data)):
        return read_text(data)  # type: ignore[arg-type]
    return Examples.of(data)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Order:
    """What was asked for, checked: everything that defines a run besides the model.

    Attributes:
        method: name of the method.
        settings: all its parameters and the common fields that were set.
        recipe: built from them.
        budget: None if the recipe has a rank rule of its own and no budget was given.
        text: calibration text or examples, None if the recipe measures nothing.
        samples, length, seed, batch: of the calibration.
    """

    method: str
    settings: dict[str, Any]
    recipe: Recipe
    budget: Budget | None
    text: Text | Examples | None
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
        limit = Budget.parse(**budget, scope=scope) if given or recipe.rule is None else None
        needs_text = bool(recipe.statistics) or recipe.sequential or recipe.looks
        text = _calibration_data(data) if needs_text else None
        return cls(method, {**entry.parameters, **settings}, recipe, limit, text, **rest)

    @property
    def example(self) -> Mapping[str, Any] | None:
        """Model inputs of the shapes that will come, None for text."""
        return self.text.items[0] if isinstance(self.text, Examples) else None

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

    def job(self, source: ResidentModel, tokenizer: Any, sink: Any, dtype: torch.dtype, **rest: Any) -> Job:
        """The engine's job for a model.

        Raises:
            CorankError: unknown sites, a text too short, a budget below what is not compressed.
        """
        plan = source.outline
        sites = select_sites(plan.sites, self.recipe.targets, self.recipe.ignore, plan.optional)
        data = heldout = None
        if isinstance(self.text, Examples):
            data = self.text.calibration()
        elif self.text is not None:
            if tokenizer is None:
                raise CorankError("Give tokenizer=..., which calibration needs.")
            data = calibration(tokenizer, self.text, self.samples, self.length, self.seed, bos=adds_bos(tokenizer))
            heldout = self._held_out(tokenizer, data) if self.recipe.looks else None
        limit = None
        if self.budget is not None:
            inside = sum(s.numel for s in sites)
            limit = self.budget.limit(inside, source.outline.parameters - inside, dtype.itemsize * 8)
        rest["heldout"] = heldout
        return Job(source, self.recipe, sites, limit, data, sink, dtype, seed=self.seed, batch=self.batch, **rest)

    def _held_out(self, tokenizer: Any, data: Calibration) -> Calibration:
        """Windows that were not drawn for calibration; some of those that were, if the text has no others."""
        assert isinstance(self.text, Text)
        count = self.recipe.probe_windows
        fresh: list[int] = []
        with contextlib.suppress(CorankError):  # a longer draw holds the same windows, of every text of a mixture
            drawn = self.samples + count
            more = calibration(tokenizer, self.text, drawn, self.length, self.seed, bos=adds_bos(tokenizer))
            seen = set(map(tuple, data.ids.tolist()))
            fresh = [i for i, window in enumerate(more.ids.tolist()) if tuple(window) not in seen]
        if fresh:
            return Calibration(more.ids[fresh], None, more.source)
        return Calibration(data.ids[:: max(len(data.ids) // count, 1)][:count], None, data.source)
