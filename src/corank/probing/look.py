"""What the allocators that look at the model are shown, beside the curves that every allocator is given."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corank.budget import Curve
from corank.engine.job import Job
from corank.engine.store import StatisticsStore
from corank.probing import first_order, lems, sensitivity, training
from corank.probing.probe import Prober


@dataclass(frozen=True)
class Looked:
    """What was found.

    Attributes:
        curves: in the currency of the allocator.
        options: further arguments of the allocator.
    """

    curves: list[Curve]
    options: dict[str, Any] = field(default_factory=dict)


def look(job: Job, store: StatisticsStore, curves: Sequence[Curve], limit: int) -> Looked:
    """Measure what the recipe's allocator wants to know; nothing for most of them.

    Args:
        job: what is to be done.
        store: with the recipe's statistics; what is measured here is kept in it.
        curves: one per site, in the recipe's geometry.
        limit: stored values allowed over all sites.

    Raises:
        CorankError: the model or the recipe is not one that the allocator can look at.
    """
    name, recipe = job.recipe.allocate, job.recipe
    if not recipe.looks:
        return Looked(list(curves))
    start = time.perf_counter()
    with job.stage("probe"):
        if name == "zs-svd":
            found = Looked(first_order.measured(job, store, curves))
        elif name in training.FAMILIES:
            found = Looked(training.learned(job, store, curves, limit))
        elif name == "acip":
            from corank.gates import components  # the only one that trains, with what heals

            ranks, job.scored = components.learned(job, store, curves, limit)
            found = Looked(list(curves), {"ranks": ranks})
        else:
            prober = Prober(job, store)
            if name == "lems":
                found = Looked(lems.measured(prober, curves))
            elif name == "asvd-search":
                found = Looked(sensitivity.measured(prober, curves, limit, recipe.multiple_of))
            else:
                judge = functools.partial(_divergence, prober)
                found = Looked(list(curves), {"judge": judge, "trials": recipe.trials, "seed": job.seed})
    job.stages["allocate"] = job.stages.get("allocate", 0.0) - (
        time.perf_counter() - start
    )  # this is part of that stage
    return found


def _divergence(prober: Prober, ranks: Mapping[str, int | None]) -> float:
    """Nats per token that a whole choice of ranks costs."""
    return min(prober.effects([{site: rank for site, rank in ranks.items() if rank is not None}])[0].kl, 1e3)
