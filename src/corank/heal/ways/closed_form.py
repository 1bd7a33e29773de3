"""Refits in closed form: every factorized matrix is fitted again to what it will really read, without any training.

    min over the free factors of W' and its bias of  E || t - (W' x^ + b') ||^2 + rho || W - W' ||_F^2
    t = s (W x + b) + (1 - s) (W x^ + b)

x is what the matrix reads in the dense model, x^ in the compressed one refitted up to there; both moments E[x x^^T] and
E[x^ x^^T] are measured group by group in the order of execution (MPIFA, arXiv:2501.19090; AA-SVD, arXiv:2604.02119; the
output factor alone: SVD-LLM's update, arXiv:2403.07378). Of a CUR the link is free, M = C^+ W~ H R^T (R H R^T)^+: what
CURing's layer-wise distillation of the link (arXiv:2501.04211) converges to. A bias, where there is one, absorbs the means.

The pull rho to W stands for the inputs that were not seen. Of s = 1, 1/2, 0 and the factors as they were, that is kept
which leaves the smallest error of the block's output on held-out sequences. A basis that other blocks read is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corank.engine.routed import ENOUGH
from corank.factors import FactorizedLinear, SharedLowRankLinear, weight_of
from corank.heal.blocks import Visit, by_blocks, matrices, parameters_by_blocks
from corank.heal.refit import refitted
from corank.heal.training import History
from corank.heal.way import Case, Way
from corank.linalg import retarget
from corank.model import Site
from corank.statistics import Cross, CrossGram

RIDGE = 1e-3
"""rho over the mean square of the inputs."""
MIXES = (1.0, 0.5, 0.0)
"""s: how much of the dense model's output is in the target."""

FREE = {
    "low_rank": {"B": "up", "A": "down"},
    "shared": {"B": "up"},
    "cur": {"M": "link"},
    "row_pivoted": {"rows": "down", "rest": "up"},
    "column_pivoted": {"columns": "up", "rest": "down"},
}
"""Kind -> field of its factors -> part of its layer."""


@dataclass(frozen=True)
class Aim:
    """What one matrix should become for every s: W~ = W + s drift, under a metric.

    Attributes:
        W: [m, n], dense.
        drift: [m, n].
        metric: [n, n], E[x^ x^^T] + rho I, about the mean where there is a bias.
        bias: [m] of the dense layer.
        mean, drifted_mean: [n], of x and x^; zero where there is no bias.
    """

    W: Tensor
    drift: Tensor
    metric: Tensor
    bias: Tensor
    mean: Tensor
    drifted_mean: Tensor

    def target(self, s: float) -> Tensor:
        """W~ [m, n]."""
        return self.W + s * self.drift

    def bias_for(self, weight: Tensor, s: float) -> Tensor:
        """The bias that makes the mean output right, for the weight as it is stored."""
        wanted = self.W @ (s * self.mean + (1 - s) * self.drifted_mean)
        return self.bias + wanted - weight.double() @ self.drifted_mean


def aim_at(dense: nn.Module, layer: FactorizedLinear, moments: Cross) -> Aim:
    """The aim of a factorized layer, from the dense one and the moments of their inputs."""
    W = weight_of(dense).double()
    own: Any = getattr(dense, "bias", None)
    bias = W.new_zeros(len(W)) if own is None else own.detach().double()
    C, H, x, z = moments.C, moments.H, moments.mean, moments.drifted_mean
    if layer.bias is None:
        x, z = torch.zeros_like(x), torch.zeros_like(z)
    C, H = C - torch.outer(x, z), H - torch.outer(z, z)
    H.diagonal().clamp_(min=0)
    rho = RIDGE * float(H.diagonal().mean())
    metric = H + rho * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return Aim(W, retarget(W, C, H, ridge=RIDGE) - W, metric, bias, x, z)


def put(layer: Any, aim: Aim, s: float, basis: bool) -> None:
    """Refit a layer in place; its bias for the factors as they are rounded."""
    new = refitted(layer.factors(), aim.target(s), aim.metric, basis=basis).tensors()
    with torch.no_grad():
        for field, name in FREE[layer.kind].items():
            if field != "A" or basis:
                getattr(layer, name).weight.copy_(new[field])
        if layer.bias is not None:
            layer.bias.copy_(aim.bias_for(layer.dense_weight(), s))


def refit(visit: Visit, ends: float | None) -> History:
    """Refit the matrices of one block, group after group."""
    case, history = visit.case, History()
    start = time.perf_counter()

    def judge() -> float:
        with torch.no_grad():
            return float(visit.error(case.heldout))

    history.note(0, judge())
    for stage in stages(case, visit) if ends is None or time.perf_counter() < ends else []:
        aims = _aims(visit, stage)
        layers = {path: visit.block.get_submodule(path) for path in aims}
        own = {f"{path}.{n}": p for path, layer in layers.items() for n, p in layer.named_parameters()}
        free = {id(p) for p in visit.parameters.values()}
        best, values = history.best, _copies(own)
        for s in MIXES:
            for path, layer in layers.items():
                down: Any = getattr(layer, "down", None)
                movable = not isinstance(layer, SharedLowRankLinear) and not getattr(layer, "followed", False)
                put(layer, aims[path], s, movable and id(getattr(down, "weight", None)) in free)
            error = judge()
            if error < best:
                best, values = error, _copies(own)
        _put_back(own, values)
        history.seconds = time.perf_counter() - start
        history.note(len(history.steps), best)
    history.seconds = time.perf_counter() - start
    return history


def stages(case: Case, visit: Visit) -> list[list[Site]]:
    """Factorized matrices of a block in the order of execution; those that read one input, or are experts', together."""
    plan, paths = case.student.outline, set(matrices(visit.block, visit.dense))
    found: dict[str, list[Site]] = {}
    for site in plan.sites:
        if site.layer == visit.layer and plan.local(site) in paths:
            found.setdefault(site.pool or site.group, []).append(site)
    return list(found.values())


def _aims(visit: Visit, stage: list[Site]) -> dict[str, Aim]:
    """Path -> aim of the matrices of a stage; experts that saw too few tokens are left out."""
    local = visit.case.student.outline.local
    leaders = {site.group: local(site) for site in reversed(stage)}
    widths = {site.group: site.shape[1] for site in stage}
    moments = {group: CrossGram(widths[group]) for group in leaders}
    for i in visit.case.learned:
        seen = visit.inputs(i, list(leaders.values()))
        for group, path in leaders.items():
            if path in seen:
                moments[group].update(*seen[path])
    aims = {}
    for site in stage:
        measured = moments[site.group]
        if measured.count and (site.pool is None or measured.count >= ENOUGH * site.shape[1]):
            path = local(site)
            layer: Any = visit.block.get_submodule(path)
            aims[path] = aim_at(visit.dense.get_submodule(path), layer, measured.result())
    return aims


def _copies(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in own.items()}


def _put_back(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(values[n])


def run(case: Case) -> list[History]:
    """One block after the other; those that the clock leaves no time for stay as they are."""
    minutes = case.schedule.minutes
    ends = None if minutes is None else time.perf_counter() + 60 * minutes
    return by_blocks(case, lambda visit: refit(visit, ends))


WAY = Way(
    "every factorized matrix is refitted to what it will really read, exactly and without training; local",
    run,
    parameters_by_blocks,
    what=("layers",),
    measure="of the blocks' output, squared",
    local=True,
    by_blocks=True,
)
