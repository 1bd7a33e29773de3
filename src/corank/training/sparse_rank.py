"""Pruned first, then factorized: sparse matrices of low rank, and directions that learn to go (speech-prune-svd).

    1. train the weights W and a mask M, which closes weight by weight:   loss + eta mean_l ||M_l * W_l||_* / ||W_l||_*
    2. M * W = U S V^T;  y = U S^1/2 (z * (S^1/2 V^T x)),  z = 1[theta > 0], theta beginning in the order of the energies:
       train theta:  loss + lambda sum_i (m + n) relu(theta_i)  until the directions that are open fit, lambda keeping the pace
    3. W <- what is left of the directions; W <- M * W where factors would not be smaller

The model is in memory and changes in place. What comes out is a rank for each matrix, which has that rank exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corank.engine.job import Job
from corank.errors import CorankError, unknown
from corank.factors import is_conv1d
from corank.gates import Directions, Gates, Plain, Recorder, ScoreMap, StraightThrough, language_loss, steps, train
from corank.gates.components import prior
from corank.gates.shrinking import Shrinking, rate
from corank.model import Calibration, ResidentModel, Site
from corank.training.movement import BY, MovementPruning
from corank.training.nuclear import TINY, nuclear_norm

Loss = Callable[[Sequence[int]], Tensor]

SHARE = 0.5
"""Share of the steps in which weights are pruned; directions learn to go in the others."""
STRIDE = 8
"""One matrix in so many is penalised at a step, in turn, so many times as strongly: decompositions take time."""


@dataclass(frozen=True)
class SparseRank:
    """See `corank.recipe.Recipe.train`.

    Attributes:
        density: share of the weights of each matrix that is left before it is decomposed.
        by: what says which weights go, "magnitude" or "first-order".
        nuclear: eta.
        rate: learning rate of the weights.

    Raises:
        CorankError: a value out of range.
    """

    density: float = 0.7
    by: str = "magnitude"
    nuclear: float = 0.1
    rate: float = 5e-5

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise unknown("way to choose weights", self.by, BY)
        if not 0 < self.density <= 1 or not self.nuclear >= 0 or not self.rate > 0:
            raise CorankError("density must be above 0 and at most 1, nuclear not negative, and rate positive.")

    def __call__(self, job: Job, work: Path | None = None) -> dict[str, int]:
        """Train the model of a job, in place.

        Args:
            job: what is to be compressed; its recipe names steps and minutes.
            work: directory of the states of both trainings, None: not resumable.

        Returns:
            rank by name of the matrices that have become factors' products; the others stay dense.

        Raises:
            CorankError: nothing can be decomposed, or the budget is out of reach.
        """
        sites = [s for s in job.sites if s.form == "linear" and s.pool is None and s.tied is None and not s.refusal]
        room = _room(job, sites)
        if room >= sum(s.numel for s in sites):
            return {}  # nothing has to go
        data, loss = task_loss(job.source, _checked(job.data))
        first = max(round(SHARE * job.recipe.steps), 1)
        second = max(job.recipe.steps - first, 1)
        minutes = job.recipe.minutes
        halves = (None, None) if minutes is None else (SHARE * minutes, (1 - SHARE) * minutes)
        with job.stage("train"):
            self.prune(job, sites, data, loss, first, halves[0], None if work is None else work / "pruning.pt")
            if job.recipe.rule is None:  # an allocator has been asked for: it takes the pruned matrices from here
                return {}
            places = [directions(job.source.model, site) for site in sites]
            state = None if work is None else work / "directions.pt"
            return select(job, places, data, loss, room, second, halves[1], state)

    def prune(
        self,
        job: Job,
        sites: Sequence[Site],
        data: Calibration,
        loss: Loss,
        count: int,
        minutes: float | None,
        state: Path | None,
    ) -> None:
        """Step 1: leave the share `density` of the weights of each matrix, and train them."""
        model, names = job.source.model, [s.name for s in sites]
        flags = {name: model.get_submodule(name).weight.requires_grad for name in names}  # type: ignore[union-attr]
        pruning = MovementPruning(model, names, self.density, count, by=self.by)
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        with torch.no_grad():
            whole = {name: float(nuclear_norm(layer.weight)) or 1.0 for name, layer in layers.items()}
        stride = min(STRIDE, len(names))

        def penalty(step: int) -> Tensor:
            chosen = names[step % stride :: stride]
            norms = [nuclear_norm(layers[name].weight) / whole[name] for name in chosen]
            return self.nuclear * stride * torch.stack(norms).sum() / len(names)

        weights: dict[str, nn.Parameter] = {
            f"weight.{name}": layer.parametrizations.weight.original for name, layer in layers.items()
        }
        try:
            _train(
                job,
                Gates([], Plain()),
                data,
                loss,
                count,
                minutes,
                self.rate,
                state,
                penalty=penalty if self.nuclear else None,
                beside=weights,
                companions=[Closing(pruning)],
                constant=False,
            )
        finally:
            pruning.step(count)
            pruning.finish()
            for name, flag in flags.items():
                layers[name].weight.requires_grad_(flag)


class Closing:
    """Lets masks of weights follow their schedule; a companion of the training."""

    def __init__(self, pruning: MovementPruning):
        self.pruning = pruning

    def before(self, step: int) -> None:
        """Nothing."""

    def after(self, step: int, values: Mapping[str, Tensor]) -> bool:
        """Set the masks."""
        self.pruning.step(step + 1)
        return False

    def state(self) -> dict[str, Any]:
        """Masks and scores."""
        return self.pruning.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.pruning.restore(state)


@torch.no_grad()
def directions(model: nn.Module, site: Site) -> Directions:
    """Step 2: the two factors U S^1/2 and S^1/2 V^T of a matrix, of its numerical rank."""
    layer: Any = model.get_submodule(site.name)
    W = layer.weight.mT if is_conv1d(layer) else layer.weight
    U, s, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    p = max(int((s > TINY * s[0]).sum()), 1)
    root = s[:p].sqrt()
    like = {"dtype": W.dtype, "device": W.device}
    return Directions(site.name, site.name, (U[:, :p] * root).to(**like), (root[:, None] * Vt[:p]).to(**like))


def select(
    job: Job,
    places: Sequence[Directions],
    data: Calibration,
    loss: Loss,
    room: int,
    count: int,
    minutes: float | None = None,
    state: Path | None = None,
) -> dict[str, int]:
    """Steps 2 and 3: let directions learn to go until the others fit, and leave the others in the weights.

    Args:
        job: whose model it is.
        places: the directions of the matrices; each is the matrix as it is.
        data, loss: to learn from.
        room: parameters that these matrices may have.
        count: steps.
        minutes: an earlier end by the clock.
        state: file of the state.

    Returns:
        rank by name of what has become smaller.
    """
    dtype = torch.promote_types(job.source.dtype, torch.float32)
    gates = Gates(places, StraightThrough(), dtype, job.source.device)
    energy = {place.name: place.up.double().square().sum(0).square() for place in places}  # columns of U S^1/2
    first = prior({n: e / e.sum().clamp_min(TINY**2) / sum(gates.places[n].shape) for n, e in energy.items()})
    with torch.no_grad():
        for name, theta in gates.theta.items():
            theta.copy_(first[name])
    shrinking, recorder = Shrinking(gates, room / max(gates.dense, 1), count), Recorder(gates)
    with gates.attached(job.source.model):
        _train(
            job,
            gates,
            data,
            loss,
            count,
            minutes,
            rate(count),
            state,
            penalty=shrinking,
            companions=[recorder, shrinking],
        )
    kept = ScoreMap(recorder.scores().scores, first).kept(gates.places, room, least=1)
    ranks: dict[str, int] = {}
    with torch.no_grad():
        for place in places:
            chosen = kept[place.name]
            if place.cost(len(chosen)) < place.dense:
                layer: Any = job.source.model.get_submodule(place.module)
                W = place.up[:, chosen].double() @ place.down[chosen].double()
                layer.weight.copy_(W.mT if is_conv1d(layer) else W)
                ranks[place.name] = len(chosen)
    return ranks


def task_loss(source: ResidentModel, data: Calibration) -> tuple[Calibration, Loss]:
    """What is minimised: the loss of a language model on text; else the model's own loss on labels; else the distance from
    what the model, as it is now, puts out, relative to the size of that.

    Args:
        source: the dense model.
        data: text, or examples; labels among the examples are used.

    Returns:
        (data with one entry in `ids` for each index, indices -> loss).
    """
    language = source.model.can_generate() and not source.config.is_encoder_decoder
    if language and not data.examples:
        return data, lambda which: language_loss(source, data, which)
    examples = [source.complete(each) for each in data.batches(1)]
    with torch.no_grad():
        before = [None if "labels" in each else _output(source.model(**each)).clone() for each in examples]

    def loss(which: Sequence[int]) -> Tensor:
        total = []
        for i in which:
            out, aim = source.model(**examples[i]), before[i]
            if aim is None:
                total.append(out.loss)
            else:
                total.append((_output(out) - aim).square().mean() / aim.square().mean().clamp_min(1e-12))
        return torch.stack(total).mean()

    return replace(data, ids=torch.zeros(len(examples), 0, dtype=torch.long), mask=None), loss


def _output(output: Any) -> Tensor:
    """Logits, or the last hidden state, or whatever comes first."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    values = output.values() if isinstance(output, Mapping) else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def _train(
    job: Job,
    gates: Gates,
    data: Calibration,
    loss: Loss,
    count: int,
    minutes: float | None,
    rate: float,
    state: Path | None,
    **how: Any,
) -> None:
    plan = steps(
        count,
        len(data.ids),
        batch=min(job.batch, 2),
        learning_rate=rate,
        minutes=minutes,
        seed=job.seed,
        precision="float32",
    )
    layers = max(job.source.outline.layers, 1)

    def report(done: int, of: int, value: float, size: float) -> None:
        job.report(min(done * layers // max(of, 1), layers - 1), "train", None)

    history = train(job.source, gates, data, plan, loss=loss, state=state, report=report, **how)
    if history.ended:
        raise CorankError(f"Training failed: {history.ended}; use a smaller learning rate.")


def _checked(data: Calibration | None) -> Calibration:
    assert data is not None, "a recipe that trains needs data"
    return data


def _room(job: Job, sites: Sequence[Site]) -> int:
    """What the matrices that can be decomposed may have together.

    Raises:
        CorankError: there are none, or rank 1 is too large.
    """
    if job.limit is None or job.clock is not None:
        raise CorankError("This method needs a size to reach; give keep=..., remove=..., params=... or bytes=....")
    if not sites:
        raise CorankError("None of the matrices asked for is a linear layer of its own, which this method prunes.")
    room = job.limit - sum(s.numel for s in job.sites) + sum(s.numel for s in sites)
    least = sum(min(sum(s.shape), s.numel) for s in sites)
    if room < least:
        raise CorankError(
            f"The budget leaves {max(room, 0):,} parameters to matrices that have {least:,} at rank 1; keep more."
        )
    return room
