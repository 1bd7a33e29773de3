"""Decompositions kept between visits and between runs: any further ratio or allocator costs no new one.

What is kept of a site is its `Truncation`, in the precision of its vectors: about as much as the weight itself. It is
found again by a fingerprint of the weight and of the geometry, so that it can never be mistaken for another one.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from corank.engine.job import Job
from corank.engine.store import StatisticsStore
from corank.factorize import Geometry, Spectral
from corank.linalg import Truncation
from corank.model import Site


def fingerprint(W: Tensor, geometry: Geometry, extra: str = "") -> str:
    """A hash that changes with the weight [m, n] and with either metric."""
    digest = hashlib.blake2b(f"{extra}|{tuple(W.shape)}|{W.dtype}".encode(), digest_size=16)
    for matrix in (W, geometry.right.G, geometry.R):
        digest.update(b"|")
        if matrix is not None:
            rows = matrix.double().cpu()
            digest.update(rows.square().sum(-1).numpy().tobytes())
            digest.update(rows.sum(0).numpy().tobytes())
    return digest.hexdigest()


def truncation_of(job: Job, store: StatisticsStore, site: Site, W: Tensor, geometry: Geometry) -> Truncation | None:
    """All truncations of a site, from the store if it has them; None if the recipe does not truncate.

    Its components are in the order of what they carry, or in that of a score map if they have been chosen by one.
    """
    factorizer = job.recipe.factorize
    if not isinstance(factorizer, Spectral):
        return None
    if job.scored is not None:
        found: Truncation = job.scored.truncations[site.name]
        return found
    target = W if W.dtype == torch.float64 else W.float()
    key = fingerprint(target, geometry, factorizer.precision)
    kept = store.load_spectrum(site.layer, key)
    if kept is not None:
        return Truncation(kept["up"], kept["project"], kept["energy"], float(kept["total"]))
    made = factorizer.decompose(target, geometry)
    total = torch.tensor(made.total, dtype=torch.float64)
    store.save_spectrum(
        site.layer, key, {"up": made.up, "project": made.project, "energy": made.energy, "total": total}
    )
    return made
