"""Learning how many components every matrix keeps, from the predictions of the dense model.

A layer's output is projected behind it: y -> sum_i (mask_i - dense) up_i project_i y + dense y, so no weight is touched and
nothing but the masks has gradients. One step is a forward pass that keeps the blocks' inputs and a backward pass block by
block that computes each once more: never more than one block of weights is needed. All masks have one shift in common,
chosen so that the expected size is the budget, and differentiated through: a mask that grows makes the others shrink.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from corank.budget import Curve
from corank.engine.job import Job
from corank.engine.measure import data_of, results_of
from corank.engine.site import read_site, site_geometry
from corank.engine.spectra import fingerprint, truncation_of
from corank.engine.store import StatisticsStore, read_tensors, write_tensors
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factorize import Spectral
from corank.model import Site
from corank.probing.first_order import require_components
from corank.probing.masks import Buckets, Masks, Positions, hard
from corank.probing.probe import check, divergence, log_probabilities

SEQUENCES = 2
"""Calibration windows in one step."""
BASES_BYTES = 1 << 30
"""Components kept in memory between the steps; others are read from the store each time."""
HARD_FROM = 2 / 3
"""Part of the training after which the masks are rounded on the way forward (straight through)."""

FAMILIES: dict[str, type[Buckets] | type[Positions]] = {"ara": Buckets, "dobi-svd": Positions}
"""Allocator -> the masks it learns."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Components of one site as its layer's output needs them.

    Attributes:
        up: [m, p].
        project: [p, m].
        offset: [m], what of the output is not W x (the bias; about a mean input, W mean too); None: nothing.
    """

    up: Tensor
    project: Tensor
    offset: Tensor | None


def learned(job: Job, store: StatisticsStore, curves: Sequence[Curve], limit: int) -> list[Curve]:
    """The curves with losses that say how much every site wants a further rank, by masks trained for this budget.

    Args:
        job: its recipe names the family (`FAMILIES`) and the number of steps.
        store: with the recipe's statistics; trained masks are kept in it.
        curves: one per site.
        limit: stored values allowed over all sites.

    Raises:
        CorankError: the model or the recipe is not one that masks can be trained in.
    """
    check(job)
    require_components(job)
    other = next((s for s in job.sites if s.form != "linear"), None)
    if other is not None:
        raise CorankError(
            f"allocate={job.recipe.allocate} masks the outputs of linear layers, and {other.name} is a layer of the form "
            f"{other.form!r}; leave it out (ignore={other.name}) or use allocate=lems."
        )
    dense = sum(curve.dense_cost for curve in curves)
    least = sum(int(curve.cost.min(initial=curve.dense_cost)) for curve in curves)
    if not least < limit < dense:
        return list(curves)  # nothing to be chosen; the allocator says if it is impossible
    masks: Masks = FAMILIES[job.recipe.allocate](curves, limit / dense)
    trainer = Trainer(job, store, [curve.site for curve in curves])
    file = store.root / f"masks-{trainer.key(limit)}.safetensors"
    if file.is_file():
        masks.theta = read_tensors(file)["theta"]
    else:
        trainer.train(masks, limit)
        write_tensors(file, {"theta": masks.theta.detach()})
    needs = masks.needs(balance(masks, limit))
    return [replace(curve, loss=need) for curve, need in zip(curves, needs, strict=True)]


def balance(masks: Masks, limit: int) -> Tensor:
    """The common shift at which the expected sizes add up to `limit`, differentiable in the parameters.

    Its value is found by bisection; one Newton step from there changes nothing but gives it the gradient of the implicit
    function.
    """
    low, high = -1e3, 1e3
    with torch.no_grad():
        for _ in range(60):
            middle = (low + high) / 2
            fits = float(masks.sizes(torch.tensor(middle, dtype=torch.float64)).sum()) <= limit
            low, high = (middle, high) if fits else (low, middle)
    t = torch.tensor(low, dtype=torch.float64, requires_grad=True)
    size = masks.sizes(t).sum()
    slope = torch.autograd.grad(size, t, retain_graph=True, allow_unused=True)[0]
    if slope is None or not float(slope) > 0:
        return t.detach()
    return t.detach() - (masks.sizes(t.detach()).sum() - limit) / slope.detach()


class Trainer:
    """Runs the model with masks behind some of its layers.

    Args:
        job: the model, its calibration data and the recipe.
        store: with the recipe's statistics.
        names: sites in the order of the masks.
    """

    def __init__(self, job: Job, store: StatisticsStore, names: Sequence[str]):
        self.job, self.store = job, store
        sites = {s.name: s for s in job.sites}
        self.sites: list[Site] = [sites[name] for name in names]
        self._in_layer: dict[int, list[int]] = {}
        for i, site in enumerate(self.sites):
            self._in_layer.setdefault(site.layer, []).append(i)
        self._keys: dict[int, str] = {}
        self._offsets: dict[int, Tensor | None] = {}
        self._bases: dict[int, Basis] = {}
        self._room = BASES_BYTES
        for layer in self._in_layer:
            self._prepare(layer)

    def _prepare(self, layer: int) -> None:
        job = self.job
        assert isinstance(job.recipe.factorize, Spectral)
        lookup = results_of(job, self.store, layer, None)
        with job.source.block(layer) as block:
            for i in self._in_layer[layer]:
                site = self.sites[i]
                W, bias = read_site(block, site, job.source.outline.local(site))
                geometry = site_geometry(job.recipe, lookup(site, {}))
                truncation_of(job, self.store, site, W, geometry)
                target = W if W.dtype == torch.float64 else W.float()
                self._keys[i] = fingerprint(target, geometry, job.recipe.factorize.precision)
                offset = None if bias is None else bias.detach().clone()
                if geometry.mean is not None:
                    mean = (W.double() @ geometry.mean.to(W.device)).to(W.dtype)
                    offset = mean if offset is None else offset + mean
                self._offsets[i] = offset

    def _basis(self, i: int) -> Basis:
        if i in self._bases:
            return self._bases[i]
        kept = self.store.load_spectrum(self.sites[i].layer, self._keys[i])
        assert kept is not None
        up, project = (kept[name].to(self.job.source.device, self.job.source.dtype) for name in ("up", "project"))
        basis = Basis(up, project, self._offsets[i])
        size = basis.up.nbytes + basis.project.nbytes
        if size <= self._room:
            self._bases[i] = basis
            self._room -= size
        return basis

    def key(self, limit: int) -> str:
        """A hash of all that the trained masks depend on."""
        recipe, data = self.job.recipe, data_of(self.job)
        how = [recipe.allocate, recipe.steps, recipe.kind, self.job.seed, self.job.source.dtype, limit]
        digest = hashlib.sha256("|".join(map(str, [*how, *self._keys.values()])).encode())
        digest.update(data.ids.numpy().tobytes())
        return digest.hexdigest()[:16]

    def train(self, masks: Masks, limit: int) -> None:
        """Adjust the parameters of the masks.

        Args:
            masks: of the sites, in their order.
            limit: stored values allowed over all sites.
        """
        steps, job = self.job.recipe.steps, self.job
        stream = Stream(job.source, data_of(job), SEQUENCES)
        dense = self._dense(stream)
        generator = torch.Generator().manual_seed(job.seed)
        order = [
            int(i) for _ in range(-(-steps // len(stream))) for i in torch.randperm(len(stream), generator=generator)
        ]
        masks.theta.requires_grad_()
        optimizer = torch.optim.Adam([masks.theta], lr=masks.rate, eps=1e-30)
        for step, batch in zip(range(steps), order, strict=False):
            progress = step / max(steps - 1, 1)
            optimizer.param_groups[0]["lr"] = masks.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
            t = balance(masks, limit)
            soft = masks.weights(t, progress)
            values = [w.detach() for pair in soft for w in pair]
            loss, gradients = self.gradients(stream, batch, dense[batch], _rounded(values, progress))
            optimizer.zero_grad()
            guide = masks.guidance(t)
            outputs = [w for pair in soft for w in pair]
            wanted = [(w, g) for w, g in zip(outputs, gradients, strict=True) if w.requires_grad and w.numel()]
            if guide.requires_grad:
                wanted.append((guide, guide.new_tensor(loss * progress)))
            torch.autograd.backward([w for w, _ in wanted], [g for _, g in wanted])
            optimizer.step()
        masks.theta = masks.theta.detach()

    def _dense(self, stream: Stream) -> list[Tensor]:
        """What the last block of the dense model returns, batch by batch."""
        hidden = list(stream.hidden)
        for layer in range(self.job.source.outline.layers):
            self.job.report(layer, "train", None)
            with self.job.source.block(layer) as block, torch.no_grad():
                hidden = [stream.run(block, layer, i, h) for i, h in enumerate(hidden)]
        return hidden

    def gradients(
        self, stream: Stream, batch: int, dense: Tensor, weights: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        """Divergence of the masked model's predictions from the dense model's, and its gradient.

        Args:
            stream: calibration windows.
            batch: which of its batches.
            dense: [sequences, tokens, d], what the dense model's last block returns.
            weights: mask [K] and dense scalar of the first site, of the second, ...

        Returns:
            (nats per token, gradients in the order and shape of `weights`, float64).
        """
        source = self.job.source
        like = stream.hidden[batch]
        leaves = [w.to(like.device, like.dtype).requires_grad_() for w in weights]
        inputs, hidden = [], like
        layers = source.outline.layers
        for layer in range(layers):
            inputs.append(hidden)
            with source.block(layer) as block, torch.no_grad(), self._masked(block, layer, leaves):
                hidden = stream.run(block, layer, batch, hidden)
        loss, g = self._head(stream, batch, dense, hidden)
        for layer in reversed(range(min(self._in_layer), layers)):
            x = inputs.pop().detach().requires_grad_()
            here = [leaf for i in self._in_layer.get(layer, []) for leaf in leaves[2 * i : 2 * i + 2]]
            with source.block(layer) as block, torch.enable_grad(), self._masked(block, layer, leaves):
                out = stream.run(block, layer, batch, x)
                found = torch.autograd.grad(out, [x, *here], g, allow_unused=True)
            for leaf, gradient in zip(here, found[1:], strict=True):
                leaf.grad = gradient
            assert found[0] is not None
            g = found[0]
        zero = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return loss, [gradient.to("cpu", torch.float64) for gradient in zero]

    def _head(self, stream: Stream, batch: int, dense: Tensor, hidden: Tensor) -> tuple[float, Tensor]:
        source, mask = self.job.source, stream.mask(batch)
        tokens = dense.shape[0] * dense.shape[1] if mask is None else int(mask.sum())
        total, parts = 0.0, []
        with source.outside(head=True):
            for row in range(len(dense)):  # one sequence at a time: logits are by far the largest tensor
                ids = stream.ids[batch][row : row + 1].to(dense.device)
                real = None if mask is None else mask[row : row + 1]
                x = hidden[row : row + 1].detach().requires_grad_()
                with torch.no_grad():
                    p = log_probabilities(source.logits(ids, real, dense[row : row + 1]))
                with torch.enable_grad():
                    q = log_probabilities(source.logits(ids, real, x))
                    loss = divergence(p, q, real).sum() / max(tokens, 1)
                parts.append(torch.autograd.grad(loss, x)[0])
                total += float(loss.detach())
        return total, torch.cat(parts)

    @contextmanager
    def _masked(self, block: nn.Module, layer: int, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Put the masks behind the layers of a block for the time of a pass."""
        handles = []
        try:
            for i in self._in_layer.get(layer, []):
                hook = _projection(self._basis(i), leaves[2 * i], leaves[2 * i + 1])
                module = block.get_submodule(self.job.source.outline.local(self.sites[i]))
                handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _projection(basis: Basis, mask: Tensor, dense: Tensor):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        count = min(len(mask), basis.up.shape[1])
        up, project = basis.up[:, :count].to(out), basis.project[:count].to(out)
        y = out if basis.offset is None else out - basis.offset.to(out)
        kept = ((y @ project.T) * (mask[:count] - dense)) @ up.T + dense * y
        return kept if basis.offset is None else kept + basis.offset.to(out)

    return hook


def _rounded(weights: Sequence[Tensor], progress: float) -> list[Tensor]:
    return [hard(w) for w in weights] if progress >= HARD_FROM else list(weights)
