"""Ranks that are learned together with the weights: learning and compression in turns (lc-rank).

    L step   min over W   L(W) + mu / 2 sum_l || W_l - Theta_l ||_F^2      a few steps of AdamW
    C step   Theta_l = truncation of W_l to rank r_l, all r_l at the one price that meets the budget (`corank.budget.c_step`)
    mu grows by a factor at every turn, so that W and Theta meet

Idelbayev and Carreira-Perpinan, CVPR 2020. The model is in memory and changes in place; at the end each W_l is Theta_l.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corank.budget import Curve
from corank.budget.c_step import lc_rank
from corank.engine.job import Job
from corank.engine.site import cost
from corank.errors import CorankError
from corank.factors import is_conv1d
from corank.gates import steps
from corank.heal.training import Control, divide, fit
from corank.model import Site
from corank.training.sparse_rank import task_loss


@dataclass(frozen=True)
class RankLearning:
    """See `corank.recipe.Recipe.train`.

    Attributes:
        growth: factor of mu at every turn.
        pull: the penalty at the beginning, as a share of the loss.
        turn: steps between two C steps.
        rate: learning rate of the weights.

    Raises:
        CorankError: a value out of range.
    """

    growth: float = 1.2
    pull: float = 0.1
    turn: int = 2
    rate: float = 2e-5

    def __post_init__(self) -> None:
        if not (self.growth >= 1 and math.isfinite(self.growth)):
            raise CorankError(f"growth={self.growth:g} is below 1; 1.05 to 1.2 is usual.")
        if not self.pull > 0 or self.turn < 1 or not self.rate > 0:
            raise CorankError("pull, turn and rate must be positive.")

    def __call__(self, job: Job, work: Path | None = None) -> dict[str, int]:
        """Train the model of a job, in place.

        Args:
            job: what is to be compressed; its recipe names steps and minutes.
            work: directory of the state of the training, None: not resumable.

        Returns:
            rank by name of the matrices that have become products; the others stay dense.

        Raises:
            CorankError: nothing can be decomposed, or the budget cannot be met.
        """
        sites = [s for s in job.sites if s.form == "linear" and s.pool is None and s.tied is None and not s.refusal]
        if job.limit is None or job.clock is not None or job.data is None or not sites:
            raise CorankError("Learning ranks needs linear layers of their own, and a size to reach (keep=0.8).")
        room = job.limit - sum(s.numel for s in job.sites) + sum(s.numel for s in sites)
        if room >= sum(s.numel for s in sites):
            return {}  # nothing has to go
        turns = Turns(job, sites, room, self)
        flags = {p: p.requires_grad for p in job.source.model.parameters()}
        try:
            for p in flags:
                p.requires_grad_(False)
            with job.stage("train"):
                self._train(job, turns, work)
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)
        if job.recipe.rule is None:  # an allocator has been asked for: it takes the trained matrices from here
            return {}
        return turns.finish()

    def _train(self, job: Job, turns: Turns, work: Path | None) -> None:
        assert job.data is not None
        data, loss = task_loss(job.source, job.data)
        schedule = steps(
            job.recipe.steps,
            len(data.ids),
            batch=min(job.batch, 2),
            learning_rate=self.rate,
            minutes=job.recipe.minutes,
            seed=job.seed,
            precision="float32",
        )
        learned, heldout = divide(len(data.ids))
        with torch.no_grad():
            turns.begin(float(loss(learned[: schedule.batch])))
        layers = max(job.source.outline.layers, 1)
        history = fit(
            turns.weights,
            lambda which: loss(which) + turns.penalty(),
            learned,
            heldout,
            schedule,
            state=None if work is None else work / "ranks.pt",
            report=lambda done, of, value: job.report(min(done * layers // max(of, 1), layers - 1), "train", None),
            control=Control(after=turns.after, last=True, constant=True, state=turns.state, restore=turns.restore),
        )
        if history.ended:
            raise CorankError(f"Training failed: {history.ended}; use a smaller learning rate (rate).")


class Turns:
    """The C steps, and the penalty between them.

    Args:
        job: whose recipe says what a rank costs.
        sites: the matrices.
        room: parameters that they may have together.
        how: mu, and how often.

    Attributes:
        weights: name of a matrix -> its parameter, as it is stored.
        targets: name -> Theta, stored the same way.
        ranks: name -> rank, None for dense.
        mu: weight of the penalty.
    """

    def __init__(self, job: Job, sites: Sequence[Site], room: int, how: RankLearning):
        self.job, self.sites, self.room, self.how = job, list(sites), room, how
        layers: dict[str, Any] = {s.name: job.source.model.get_submodule(s.name) for s in sites}
        self.weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}
        self.turned = {name for name, layer in layers.items() if is_conv1d(layer)}
        self.targets: dict[str, Tensor] = {}
        self.ranks: dict[str, int | None] = {}
        self.mu = 0.0

    @torch.no_grad()
    def begin(self, loss: float) -> None:
        """The first C step, and mu in proportion to a loss."""
        self.compress(self.weights)
        distance = sum(float((w - self.targets[n]).square().sum()) for n, w in self.weights.items())
        self.mu = 2 * self.how.pull * abs(loss) / max(distance, 1e-12)

    @torch.no_grad()
    def compress(self, weights: Mapping[str, Tensor]) -> None:
        """The C step: all ranks at the one price that the budget allows, and the truncations to them."""
        parts, curves = {}, []
        for site in self.sites:
            W = weights[site.name]
            U, s, Vt = torch.linalg.svd((W.mT if site.name in self.turned else W).double(), full_matrices=False)
            parts[site.name] = (U, s, Vt)
            tail = torch.cat([s.square(), s.new_zeros(1)]).flip(0).cumsum(0).flip(0)
            count = self._cost(site)
            curves.append(Curve.from_count(site.name, site.shape, count, tail.cpu().numpy(), layer=site.layer))
        self.ranks = lc_rank(curves, self.room, multiple_of=self.job.recipe.multiple_of)
        for name, (U, s, Vt) in parts.items():
            rank = self.ranks[name]
            kept = (U[:, :rank] * s[:rank]) @ Vt[:rank]
            self.targets[name] = (kept.mT if name in self.turned else kept).to(weights[name].dtype)

    def _cost(self, site: Site) -> Any:
        return lambda m, n, rank: cost(self.job.recipe, site, rank)

    def penalty(self) -> Tensor:
        """mu / 2 sum || W - Theta ||^2."""
        parts = [(w - self.targets[n].to(w.dtype)).square().sum() for n, w in self.weights.items()]
        return self.mu / 2 * torch.stack(parts).sum()

    def after(self, step: int, values: Mapping[str, Tensor]) -> bool:
        """A C step at the end of every turn."""
        if (step + 1) % self.how.turn == 0:
            self.compress({name: value.detach() for name, value in values.items()})
            self.mu *= self.how.growth
        return False

    def state(self) -> dict[str, Any]:
        """What has to be kept to go on."""
        return {"mu": self.mu, "targets": dict(self.targets), "ranks": dict(self.ranks)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        if state:
            self.mu, self.targets, self.ranks = state["mu"], dict(state["targets"]), dict(state["ranks"])

    @torch.no_grad()
    def finish(self) -> dict[str, int]:
        """The last C step, whose truncations become the weights; ranks of those that are not dense."""
        self.compress(self.weights)
        for name, weight in self.weights.items():
            if self.ranks[name] is not None:
                weight.copy_(self.targets[name])
        return {name: rank for name, rank in self.ranks.items() if rank is not None}
