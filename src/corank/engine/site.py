"""One site: from its weight and its statistics to the layer that replaces it, and what is reported of it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corank.budget import Choice
from corank.engine.forms import kind_of
from corank.engine.target import Aim, aim_of
from corank.errors import CorankError
from corank.factorize import Factored, Geometry, Measured, Spectral
from corank.factors import KINDS, FactorizedLinear, Factors, layer_for, packed, weight_of
from corank.linalg import Truncation, alternate, refit_output
from corank.model import Site
from corank.recipe import Recipe
from corank.statistics import Cross, Gram

CURVE_POINTS = 33


@dataclass(frozen=True, eq=False)
class Replacement:
    """The layer that takes a site's place, and its row in the report."""

    site: Site
    module: FactorizedLinear
    factors: Factors
    row: dict[str, Any]


def cost(recipe: Recipe, site: Site, rank: int) -> int:
    """Stored values of a site at a rank, as the recipe stores it. An affine recipe brings a bias where there is none."""
    return KINDS[kind_of(recipe, site)][0].count(*site.shape, rank) + bias_cost(recipe, site)


def stored(recipe: Recipe, site: Site, choice: Choice) -> int:
    """Values that a site of a plan stores, with a basis counted where it is stored."""
    if choice.is_dense:
        return site.numel
    return KINDS[choice.kind][0].count(*site.shape, choice.rank) + bias_cost(recipe, site)


def bias_cost(recipe: Recipe, site: Site) -> int:
    """Values of the bias that a site is given."""
    return site.shape[0] if recipe.affine and not site.bias else 0


def generator_for(seed: int, site: Site) -> torch.Generator:
    """A generator that depends on the seed and the site alone, not on the order in which sites are visited."""
    digest = hashlib.sha256(f"{seed}:{site.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def read_site(block: nn.Module, site: Site, path: str) -> tuple[Tensor, Tensor | None]:
    """W [m, n] and bias [m] of a site.

    Raises:
        CorankError: the weight is not finite; the site is named.
    """
    module = block.get_submodule(path)
    W = weight_of(module)
    if not torch.isfinite(W).all():
        raise CorankError(
            f"The weight of {site.name} (layer {site.layer}) holds NaN or infinity; the checkpoint is damaged."
        )
    bias = getattr(module, "bias", None)
    return W, None if bias is None else bias.detach()


def site_geometry(recipe: Recipe, measured: Measured) -> Geometry:
    """The recipe's geometry; about the mean input if the recipe is affine (`measured.metric()` is centred then)."""
    geometry = recipe.geometry(measured)
    return dataclasses.replace(geometry, mean=measured.gram.mean) if recipe.affine else geometry


def factorize_site(
    recipe: Recipe,
    site: Site,
    W: Tensor,
    bias: Tensor | None,
    measured: Measured,
    rank: int,
    *,
    seed: int,
    dtype: torch.dtype,
    drifted: Gram | None = None,
    cross: Cross | None = None,
    known: Truncation | None = None,
    shared: Factored | None = None,
    old: nn.Module | None = None,
    geometry: Geometry | None = None,
) -> Replacement:
    """Factorize one site at a given rank.

    Args:
        W, bias: the dense layer, [m, n] and [m] or None.
        measured: statistics that define the geometry.
        drifted: second moment of the inputs the layer will really see; needed if the recipe refits.
        cross: joint moments of both streams; needed if the dense outputs are part of the target.
        known: the decomposition of W in this geometry, if it has been made already.
        shared: what a group that shares a basis makes of it; W is not factorized on its own then, nor packed.
        seed: of the run.
        dtype: of the stored factors.
        old: the layer that is replaced, if it is not a linear one.
        geometry: what an error costs; None: the recipe's geometry of what was measured.
    """

    def share(target: Tensor, where: Geometry) -> float:
        curve = recipe.factorize.curve(target, where, generator_for(seed, site))
        return 1.0 - float(curve[rank]) / float(curve[0].clamp_min(torch.finfo(curve.dtype).tiny))

    aim = aim_of(
        recipe,
        W if W.dtype == torch.float64 else W.float(),
        site_geometry(recipe, measured) if geometry is None else geometry,
        drifted=drifted if recipe.refits else None,
        cross=cross,
        share=share,
    )
    if shared is not None:
        factored = shared
    elif known is not None and isinstance(recipe.factorize, Spectral):
        factored = recipe.factorize.cut(aim.start, known, rank)
    else:
        factored = recipe.factorize.factorize(aim.start, aim.geometry, rank, generator_for(seed, site))
    if recipe.refits and (drifted is not None or cross is not None):
        factored = _refitted(recipe, aim, factored)
    factors: Factors = factored.factors
    if recipe.pack and shared is None and factors.kind != kind_of(recipe, site):
        factors = packed(factors)
    factors = factors.astype(dtype)
    W_new = factors.astype(torch.float64).dense()  # as stored, rounding included
    new_bias = bias
    if aim.mean_output is not None and aim.final.mean is not None:
        shift = aim.mean_output - W_new @ aim.final.mean
        new_bias = (shift if bias is None else bias.double() + shift).to(dtype)
    row = _row(recipe, site, factors, factored, aim.final, aim.goal, W_new)
    if aim.mix is not None:
        row["mix"] = aim.mix
    module: Any = factors.module(new_bias) if old is None else layer_for(old, factors, new_bias)
    return Replacement(site, module, factors, row)


def _refitted(recipe: Recipe, aim: Aim, factored: Factored) -> Factored:
    """The factors fitted to the goal, in the geometry of the inputs that the layer will really see."""
    B, A = (factor.double() for factor in factored.factors.pair())
    goal, H = aim.goal.double(), aim.final.right.G
    assert H is not None
    if recipe.alternations:
        B, A = alternate(goal, A, H, aim.final.R, recipe.alternations)
    if recipe.refit:
        B = refit_output(goal @ H, A, H)
    return Factored(dataclasses.replace(factored.factors, B=B, A=A), aim.final.loss(goal - B @ A), factored.curve)


def _row(
    recipe: Recipe, site: Site, factors: Factors, factored: Factored, geometry: Geometry, target: Tensor, W_new: Tensor
) -> dict[str, Any]:
    same = factored.curve is not None and not recipe.refits
    total = float(factored.curve[0]) if same else geometry.loss(target)  # type: ignore[index]
    scale = math.sqrt(total) if total > 0 else 1.0
    curve: list[list[float]] = []
    if factored.curve is not None:
        start = math.sqrt(float(factored.curve[0])) or 1.0
        ranks = torch.linspace(0, len(factored.curve) - 1, min(CURVE_POINTS, len(factored.curve))).round().long()
        curve = [[int(r), math.sqrt(max(float(factored.curve[r]), 0.0)) / start] for r in ranks]
    return {
        "name": site.name,
        "role": site.role,
        "layer": site.block,
        "shape": list(site.shape),
        "kind": factors.kind,
        "rank": factors.rank,
        "max_rank": min(site.shape),
        "params": factors.numel + bias_cost(recipe, site),
        "params_dense": site.numel,
        "flops": flops(site, factors),
        "flops_dense": site.flops,
        "loss": math.sqrt(geometry.loss((target - W_new).to(target.dtype))) / scale,
        "predicted_loss": math.sqrt(max(factored.predicted, 0.0)) / scale,
        # second order: half the quadratic form of the curvature, in nats per token
        **({} if geometry.R is None else {"predicted_nats": max(factored.predicted, 0.0) / 2}),
        "curve": curve,
    }


def flops(site: Site, factors: Factors) -> int:
    """Operations per token, or per position of a convolution; looking a row up costs none."""
    if site.form == "embedding":
        return 2 * site.shape[0] * factors.rank
    return round(factors.flops(1) * site.share)


def dense_row(site: Site) -> dict[str, Any]:
    """The report's row of a site that stays as it is."""
    return {
        "name": site.name,
        "role": site.role,
        "layer": site.block,
        "shape": list(site.shape),
        "kind": "dense",
        "rank": min(site.shape),
        "max_rank": min(site.shape),
        "params": site.numel,
        "params_dense": site.numel,
        "flops": site.flops,
        "flops_dense": site.flops,
        "loss": 0.0,
        "predicted_loss": 0.0,
        "curve": [],
    }
