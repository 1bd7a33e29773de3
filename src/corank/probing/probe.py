"""What the predictions of the model become if some of its matrices have a given rank.

A changed model is a branch: up to its first changed block it is the dense model, so it starts there from the dense
model's activations and costs only the blocks behind. All branches go through a block together, while that block is in
memory; if their activations are too many, they go in several rounds.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corank.engine.gradients import ACTIVATION_BYTES
from corank.engine.job import Job
from corank.engine.measure import data_of, results_of
from corank.engine.site import factorize_site, read_site, site_geometry
from corank.engine.spectra import fingerprint, truncation_of
from corank.engine.store import StatisticsStore
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factorize import Measured
from corank.jsonfile import read_json, write_json
from corank.model import Calibration, Site

Change = Mapping[str, int]
"""Site -> rank; every other site is dense."""

Lookup = Callable[[Site, dict[str, Any]], Measured]


@dataclass(frozen=True)
class Effect:
    """What a change does to the predictions.

    Attributes:
        kl: KL divergence of the changed predictions from the dense model's, KL(dense || changed), nats per token.
        rise: negative log-likelihood of the text, changed minus dense, nats per token.
    """

    kl: float
    rise: float


class Prober:
    """Measures changes of a model on windows that its statistics were not measured on.

    Nothing of the model is written: layers are exchanged for the time of a forward pass and put back. Results are kept
    in the statistics store, by a hash of the weight, its geometry and the windows.

    Args:
        job: its recipe says how a matrix is factorized.
        store: with the recipe's statistics.

    Attributes:
        probes: changes measured so far; those that the store knew are not counted.

    Raises:
        CorankError: the model or a site cannot be probed.
    """

    def __init__(self, job: Job, store: StatisticsStore):
        check(job)
        self.job, self.store = job, store
        self.data = windows_of(job)
        self.probes = 0
        self._site = {s.name: s for s in job.sites}
        # packing and refits come later and change no prediction of a one-shot recipe
        self._recipe = dataclasses.replace(job.recipe, pack=False, refit=False, target="dense")
        self._file = store.root / "probes.json"
        self._known: dict[str, list[float]] = read_json(self._file) if self._file.is_file() else {}
        self._identity: dict[str, str] = {}

    def effects(self, changes: Sequence[Change]) -> list[Effect]:
        """The effect of each change, in order."""
        keys = [self._key(change) for change in changes]
        todo = {key: change for key, change in zip(keys, changes, strict=True) if change and key not in self._known}
        if todo:
            self._walk(list(todo), list(todo.values()))
        return [
            Effect(*self._known[key]) if change else Effect(0.0, 0.0) for key, change in zip(keys, changes, strict=True)
        ]

    def _key(self, change: Change) -> str:
        if not self._identity:
            self._identify()
        text = "|".join(f"{self._identity[name]}:{rank}" for name, rank in sorted(change.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _identify(self) -> None:
        """A hash of all that a probe of a site depends on besides the rank."""
        job = self.job
        windows = hashlib.sha256(self.data.ids.numpy().tobytes())
        if self.data.mask is not None:
            windows.update(self.data.mask.numpy().tobytes())
        how = f"{self._recipe.factorize}|{self._recipe.affine}|{job.source.dtype}|{job.seed}|{windows.hexdigest()}"
        for layer in range(job.source.outline.layers):
            if not job.in_layer(layer):
                continue
            lookup = results_of(job, self.store, layer, None)
            with job.source.block(layer) as block:
                for site in job.in_layer(layer):
                    W, _ = read_site(block, site, job.source.outline.local(site))
                    geometry = site_geometry(self._recipe, lookup(site, {}))
                    self._identity[site.name] = fingerprint(W, geometry, f"{site.name}|{how}")

    def _walk(self, keys: Sequence[str], changes: Sequence[Change]) -> None:
        source, job = self.job.source, self.job
        first = [min(self._site[name].layer for name in change) for change in changes]
        order = sorted(range(len(changes)), key=first.__getitem__)
        stream = Stream(source, self.data, job.batch)
        size = sum(h.numel() * h.element_size() for h in stream.hidden)
        room = max(1, ACTIVATION_BYTES // max(size, 1))
        start, front = 0, stream.hidden  # the dense model's activations in front of block `start`
        final: list[Tensor] | None = None
        while order:
            now, order = order[:room], order[room:]
            resume = first[order[0]] if order else -1
            live: dict[int, list[Tensor]] = {}
            dense = front
            for layer in range(start, source.outline.layers):
                job.report(layer, "probe", None)
                if layer == resume:
                    start, front = layer, dense
                wanted = final is None or layer < max(resume, first[now[-1]])
                running = [*live, *(c for c in now if first[c] == layer)]
                with source.block(layer) as block, torch.no_grad():
                    lookup = _once(lambda layer=layer: results_of(job, self.store, layer, None))  # type: ignore[misc]
                    for c in running:
                        with self._placed(block, layer, changes[c], lookup):
                            inputs = live.get(c, dense)
                            live[c] = [stream.run(block, layer, i, h) for i, h in enumerate(inputs)]
                    if wanted:
                        dense = [stream.run(block, layer, i, h) for i, h in enumerate(dense)]
            final = dense if final is None else final
            for c, effect in self._compare(stream, final, live).items():
                self._known[keys[c]] = [effect.kl, effect.rise]
                self.probes += 1
            write_json(self._file, self._known)

    @contextmanager
    def _placed(self, block: nn.Module, layer: int, change: Change, lookup: Callable[[], Lookup]) -> Iterator[None]:
        """The block with its changed sites at their ranks."""
        local = self.job.source.outline.local
        old: dict[str, nn.Module] = {}
        try:
            for name, rank in change.items():
                site = self._site[name]
                if site.layer == layer:
                    path = local(site)
                    module = self._module(block, site, rank, lookup())
                    old[path] = block.get_submodule(path)
                    block.set_submodule(path, module)
            yield
        finally:
            for path, module in old.items():
                block.set_submodule(path, module)

    def _module(self, block: nn.Module, site: Site, rank: int, lookup: Lookup) -> nn.Module:
        path = self.job.source.outline.local(site)
        W, bias = read_site(block, site, path)
        measured = lookup(site, {})
        known = truncation_of(self.job, self.store, site, W, site_geometry(self._recipe, measured))
        made = factorize_site(
            self._recipe,
            site,
            W,
            bias,
            measured,
            rank,
            seed=self.job.seed,
            dtype=self.job.source.dtype,
            known=known,
            old=block.get_submodule(path),
        )
        return made.module.to(W.device)

    def _compare(self, stream: Stream, dense: list[Tensor], live: Mapping[int, list[Tensor]]) -> dict[int, Effect]:
        """Effects of branches, from what the last block returns in the dense model and in each of them."""
        source = self.job.source
        causal = source.model.can_generate()
        kl, rise = dict.fromkeys(live, 0.0), dict.fromkeys(live, 0.0)
        tokens = predicted = 0
        with source.outside(head=True), torch.no_grad():
            for i, whole in enumerate(dense):
                mask = stream.mask(i)
                for row in range(len(whole)):  # one sequence at a time: logits are by far the largest tensor
                    ids = stream.ids[i][row : row + 1].to(whole.device)
                    real = None if mask is None else mask[row : row + 1]
                    count = ids.numel() if real is None else int(real.sum())
                    tokens, predicted = tokens + count, predicted + max(count - causal, 0)
                    logits = source.logits(ids, real, whole[row : row + 1])
                    p = log_probabilities(logits)
                    loss = surprise(p, ids, real, causal)
                    for c, hidden in live.items():
                        q = log_probabilities(source.logits(ids, real, hidden[i][row : row + 1]))
                        rise[c] += float(surprise(q, ids, real, causal) - loss)
                        kl[c] += float(divergence(p, q, real).double().sum())
        return {c: Effect(_finite(kl[c] / max(tokens, 1)), _finite(rise[c] / max(predicted, 1))) for c in live}


def _finite(value: float) -> float:
    return value if value == value else float("inf")  # a model that overflows is as bad as can be


def _once(compute: Callable[[], Lookup]) -> Callable[[], Lookup]:
    """Computes when first asked: a layer's statistics are not read for branches that change nothing in it."""
    made: list[Lookup] = []

    def get() -> Lookup:
        if not made:
            made.append(compute())
        return made[0]

    return get


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities [..., V], in float32 at least."""
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def divergence(p: Tensor, q: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(p || q) of every token from log-probabilities [batch, tokens, V]; 0 where `mask` [batch, tokens] is False."""
    kl = (p.exp() * (p - q)).sum(-1)
    return kl if mask is None else kl * mask.to(kl.device)


def surprise(p: Tensor, ids: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Negative log-likelihood of all tokens from log-probabilities [batch, tokens, V]; float64 scalar.

    Args:
        p: [batch, tokens, V].
        ids: [batch, tokens].
        mask: [batch, tokens], True for real tokens, or None.
        causal: position t predicts token t + 1; otherwise its own.
    """
    if causal:
        p, ids, mask = p[:, :-1], ids[:, 1:], None if mask is None else mask[:, 1:]
    nll = -p.gather(-1, ids[..., None]).squeeze(-1).double()
    return (nll if mask is None else nll * mask.to(nll.device)).sum()


def windows_of(job: Job) -> Calibration:
    """What changes are judged on: held-out windows if there are any, else what is there."""
    return data_of(job) if job.heldout is None else job.heldout


def check(job: Job) -> None:
    """Refuse what cannot be looked at.

    Raises:
        CorankError: the model has no chain of blocks, its data is no text, or a site lies outside the blocks.
    """
    name = job.recipe.allocate
    if job.source.outline.whole or data_of(job).examples:
        raise CorankError(
            f"allocate={name} compares predictions of text, of a model that is a chain of blocks; this is none: use "
            "allocate=lagrange."
        )
    outside = next((s for s in job.sites if s.outside), None)
    if outside is not None:
        raise CorankError(
            f"allocate={name} looks at matrices inside the blocks, and {outside.name} lies outside; leave it out "
            f"(ignore={outside.name}) or use allocate=lagrange."
        )
