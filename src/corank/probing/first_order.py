"""The first-order change of the loss at every rank: what the zero-sum allocator balances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from corank.budget import Curve
from corank.engine.job import Job
from corank.engine.measure import results_of
from corank.engine.site import read_site, site_geometry
from corank.engine.spectra import truncation_of
from corank.engine.store import StatisticsStore
from corank.errors import CorankError
from corank.factorize import Spectral
from corank.linalg import Truncation


def measured(job: Job, store: StatisticsStore, curves: Sequence[Curve]) -> list[Curve]:
    """The curves with `first_order`, from the mean gradient of each site.

    Raises:
        CorankError: the recipe does not truncate, so that there are no components.
    """
    require_components(job)
    found = {}
    for layer in range(job.source.outline.layers):
        if not job.in_layer(layer):
            continue
        lookup = results_of(job, store, layer, None)
        with job.source.block(layer) as block:
            for site in job.in_layer(layer):
                W, _ = read_site(block, site, job.source.outline.local(site))
                seen = lookup(site, {})
                truncation = truncation_of(job, store, site, W, site_geometry(job.recipe, seen))
                assert truncation is not None
                found[site.name] = removal(W, seen.mean_gradient.D, truncation)
    return [replace(curve, first_order=_at(found[curve.site], curve)) for curve in curves]


def removal(W: Tensor, D: Tensor, truncation: Truncation) -> Tensor:
    """First-order change of the loss if component i is removed, -<D, up_i project_i W>: float64 [p].

    Args:
        W: [m, n].
        D: dL/dW [m, n].
        truncation: of W; its components add up to W.
    """
    M = W.double() @ D.to(W.device).double().T
    up, project = truncation.up.to(M), truncation.project.to(M)
    return -((project @ M) * up.T).sum(1)


def _at(change: Tensor, curve: Curve) -> np.ndarray:
    """Change at the ranks of a curve: the sum over the components that a rank leaves out."""
    tail = np.append(np.cumsum(change.flip(0).cpu().numpy())[::-1], 0.0)
    return tail[np.minimum(curve.ranks, len(tail) - 1)]


def require_components(job: Job) -> None:
    """Refuse factorizations that are not sums of components.

    Raises:
        CorankError: says what to use instead.
    """
    if not isinstance(job.recipe.factorize, Spectral):
        raise CorankError(
            f"allocate={job.recipe.allocate} weighs the components of a truncation, and this method selects columns or "
            "rows; use allocate=lems, or a method such as svd-llm."
        )
