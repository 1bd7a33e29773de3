"""What a site's matrix is applied to, by the form of its layer: tokens of a linear layer, patches, or indicators.

The matrix of an embedding is applied to indicator vectors, one per token. Their second moment is diagonal, and its
diagonal is how often each token occurs; every token of the vocabulary is counted once beforehand, because a token that
the calibration text lacks will come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.factors import patches
from corank.model import Site
from corank.recipe import Recipe
from corank.statistics import STATISTICS, Gram, InputMoments, Moments, Statistic

OF_INDICATORS = {"gram", "moments"}
"""Statistics that are known of an embedding's inputs."""


def new_statistics(names: set[str], site: Site) -> dict[str, Any]:
    """Empty statistics of a site's input."""
    kinds: dict[str, Any] = dict(STATISTICS)
    if site.form == "embedding":
        return {"moments": InputMoments(site.shape[1])} if names & OF_INDICATORS else {}
    return {n: kinds[n](site.shape[1]) for n in names if n != "angular"}


def take_in(statistic: Statistic, site: Site, layer: nn.Module, x: Tensor, mask: Tensor | None) -> None:
    """Update a statistic with what the layer of a site is given: numbers, images, or token ids.

    Args:
        statistic: from `new_statistics`.
        site: whose input it is.
        layer: the site's layer.
        x: [..., n]; images [batch, channels, height, width]; or ids [...].
        mask: [...], True at what counts; None: all does.
    """
    if site.form == "conv":
        statistic.update(patches(layer, x))
    elif site.form == "embedding":
        ids = (x if mask is None else x[mask]).flatten()
        counts = torch.bincount(ids, minlength=site.shape[1]).double()
        seen = {"sum_x2": counts, "sum_abs": counts, "sum_x": counts, "count": torch.tensor(len(ids))}
        statistic.merge(InputMoments.from_state(seen))
    else:
        statistic.update(x, mask)


def results_for(site: Site, statistics: dict[str, Statistic], names: set[str]) -> dict[str, Any]:
    """Name -> result of the statistics of a site's input."""
    if site.form != "embedding":
        return {n: s.result() for n, s in statistics.items() if n in names}
    if not names & OF_INDICATORS:
        return {}
    state = statistics["moments"].state()
    total = int(state["count"]) + site.shape[1]
    frequency = (state["sum_abs"] + 1) / total
    known = {
        "gram": Gram(frequency, frequency, total),
        "moments": Moments(frequency.sqrt(), frequency, frequency, total),
    }
    return {n: known[n] for n in names if n in known}


def kind_of(recipe: Recipe, site: Site) -> str:
    """The kind of factors that a recipe stores a site as; what is not a linear layer is never pivoted."""
    plain = site.form == "linear" and site.tied is None
    return recipe.kind if plain else recipe.factorize.kind


def check(recipe: Recipe, site: Site, whole: bool) -> None:
    """Refuse what a recipe cannot do with a site.

    Args:
        recipe: what is to be done.
        site: where.
        whole: the model runs as a whole.

    Raises:
        CorankError: says why, and what to do.
    """
    leave = f"leave it out (ignore={site.name})"
    gradients = sorted(n for n in recipe.statistics if "gradients" in STATISTICS[n].needs)
    special = site.form != "linear" or site.tied is not None
    if special and recipe.factorize.kind != "low_rank":
        what = "part of a tied pair" if site.tied else f"a layer of the form {site.form!r}"
        raise CorankError(
            f"{site.name} is {what}, which is stored as two plain factors; this method stores "
            f"{recipe.factorize.kind} factors: choose another method, or {leave}."
        )
    if site.form == "embedding" and recipe.affine:
        raise CorankError(
            f"{site.name} is an embedding, which has no bias to absorb a mean; set affine=false, or {leave}."
        )
    unknown = sorted(set(recipe.statistics) - OF_INDICATORS - {"angular"})
    if site.form == "embedding" and unknown:
        raise CorankError(f"This method measures {unknown[0]!r}, which an embedding has none of; {leave}.")
    if gradients and (site.outside or site.pool is not None or special or whole):
        raise CorankError(
            f"This method measures {gradients[0]!r}, which needs a backward pass that reaches only linear layers inside "
            f"blocks that run one after the other; {site.name} is none: choose another method, or {leave}."
        )
    if site.outside and recipe.sequential:
        raise CorankError(
            f"{site.name} lies outside the blocks, and this method compresses block after block; set target=dense and "
            f"refit=false, or {leave}."
        )
    if whole and "angular" in recipe.statistics:
        raise CorankError(
            "This method compares the input and the output of every block, and this model does not run as one chain of "
            "blocks; choose another method."
        )
