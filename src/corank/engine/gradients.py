"""One exact backward pass through a model of which one block at a time is in memory.

Forward through the blocks, keeping only their inputs; the loss behind the last one; then backwards block by block,
recomputing each. Twice the forward cost of ordinary back-propagation's, and never more than one block of weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corank.engine.store import Table
from corank.engine.stream import Stream
from corank.engine.world import ALONE, World
from corank.model import Calibration, ResidentModel, Site
from corank.statistics import STATISTICS, Statistic


class NoGradients(Exception):
    """There are none: the message says why."""


@dataclass(frozen=True)
class Part:
    """Which part of a layer's statistics is handed over: of the forward or of the backward pass, first, last or neither."""

    forward: bool
    first: bool
    last: bool


class Looks(Protocol):
    """Gathers statistics of a block's inputs while running it."""

    table: Table

    def run(self, stream: Stream, block: nn.Module, i: int, hidden: Tensor) -> Tensor:
        """Output of the block on batch i."""
        ...


ACTIVATION_BYTES = 1 << 31
"""Block inputs kept at once; more sequences than fit are swept in several rounds."""


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Negative log-likelihood of all samples: the gradient at a token does not depend on how many others there are.

    Args:
        logits: [batch, tokens, vocabulary].
        ids: [batch, tokens].
        mask: [batch, tokens], True for real tokens, or None.
        causal: position t predicts token t + 1; otherwise its own.
    """
    if causal:
        logits, ids, mask = logits[:, :-1], ids[:, 1:], None if mask is None else mask[:, 1:]
    nll = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    weight = torch.ones_like(nll) if mask is None else mask.to(nll)
    return (nll * weight).sum()


def most_probable(logits: Tensor, labels: str) -> Tensor:
    """The logits that a prediction is made from: [batch, tokens, V] -> [batch, tokens, k] for labels "top<k>", else all.

    A label drawn among them gives the gradient g = J^T (p - e_c), J of these k logits, and E[g g^T] = J^T (diag p - p p^T) J:
    the curvature of the KL divergence between predictions that are confined to the k tokens the model prefers.
    """
    if not labels.startswith("top"):
        return logits
    return logits.topk(min(int(labels[3:]), logits.shape[-1]), dim=-1).values


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token from the model's own distribution at every position: [batch, tokens, V] -> [batch, tokens]."""
    p = torch.softmax(logits.float(), dim=-1)
    drawn = torch.multinomial(p.flatten(0, 1).to(generator.device), 1, generator=generator)
    return drawn.view(p.shape[:-1]).to(logits.device)


def sweep(
    source: ResidentModel,
    data: Calibration,
    batch: int,
    sites: Iterable[Site],
    names: Iterable[str],
    report: Callable[[int, str], None],
    keep: Callable[[int, Part, Table], None],
    *,
    labels: str = "data",
    seed: int = 0,
    look: Callable[[int, Stream], Looks] | None = None,
    world: World = ALONE,
) -> None:
    """Gradient statistics of every site, block by block from the last to the first.

    If the activations of all sequences do not fit in `ACTIVATION_BYTES` there are several rounds, and a layer's
    statistics come in several parts, to be merged.

    Args:
        source: the model.
        data: calibration windows.
        batch: sequences per forward pass.
        sites: where.
        names: statistics that need gradients.
        report: called with (layer, stage) as the sweep proceeds.
        keep: takes (layer, part, site name -> name of the statistic -> statistic).
        labels: "data", the text itself (the empirical Fisher), "sampled", tokens drawn from the model's own predictions
            (the true Fisher, whose quadratic form is the change of the predictions), or "top5", the same with
            predictions among the 5 most probable tokens alone.
        seed: of the drawn labels.
        look: (layer, stream) -> what measures that block's inputs on the way forward; its table is kept by group.
        world: the processes that share the sequences; each keeps the statistics of its own.
    """
    names, sites = list(names), list(sites)
    by_layer = {layer: [s for s in sites if s.layer == layer] for layer in {s.layer for s in sites}}
    layers, lowest = source.outline.layers, min(by_layer)
    causal = source.model.can_generate()
    generator = torch.Generator().manual_seed(seed)
    stream = Stream(source, data, batch, world)
    before = stream.numbers.start * batch  # sequences that others draw for
    per_batch = max(layers * stream.hidden[0].numel() * stream.hidden[0].element_size(), 1)
    round_size = max(1, ACTIVATION_BYTES // per_batch)
    for start in range(0, len(stream), round_size):
        chunk = range(start, min(start + round_size, len(stream)))
        part = Part(False, first=start == 0, last=chunk.stop == len(stream))
        inputs: list[list[Tensor]] = []
        hidden = [stream.hidden[i] for i in chunk]
        for layer in range(layers):
            report(layer, "forward")
            inputs.append(hidden)
            looking = None if look is None else look(layer, stream)
            with source.block(layer) as block, torch.no_grad():
                if looking is None:
                    hidden = [stream.run(block, layer, i, h) for i, h in zip(chunk, hidden, strict=True)]
                else:
                    hidden = [looking.run(stream, block, i, h) for i, h in zip(chunk, hidden, strict=True)]
                    keep(layer, replace(part, forward=True), looking.table)
        gradients = []
        with source.outside(head=True):
            for i, h in zip(chunk, hidden, strict=True):
                mask = stream.mask(i)
                parts = []
                for row in range(len(h)):  # one sequence at a time: logits are by far the largest tensor
                    x, ids = h[row : row + 1].detach().requires_grad_(), stream.ids[i][row : row + 1].to(h.device)
                    real = None if mask is None else mask[row : row + 1]
                    logits = most_probable(source.logits(ids, real, x), labels)
                    if labels != "data":
                        for _ in range(before):
                            draw(torch.zeros_like(logits), generator)
                        before = 0
                        drawn = draw(logits.detach(), generator)
                        ids = torch.cat([ids[:, :1], drawn[:, :-1]], 1) if causal else drawn
                    with _expected():
                        parts.append(torch.autograd.grad(next_token_loss(logits, ids, real, causal), x)[0])
                gradients.append(torch.cat(parts))
        for layer in reversed(range(lowest, layers)):
            report(layer, "backward")
            here = by_layer.get(layer, [])
            table: Table = {
                s.name: {
                    n: STATISTICS[n](*(s.shape if "inputs" in STATISTICS[n].needs else s.shape[:1])) for n in names
                }
                for s in here
            }
            with source.block(layer) as block, _frozen(block):
                prefix = f"{source.outline.blocks}.{layer}."
                targets = {s.name.removeprefix(prefix): table[s.name] for s in here}
                gradients = [
                    _backward(stream, block, layer, i, x, g, targets)
                    for i, x, g in zip(chunk, inputs[layer], gradients, strict=True)
                ]
            inputs[layer] = []
            if here:
                keep(layer, part, table)


def _backward(
    stream: Stream,
    block: nn.Module,
    layer: int,
    i: int,
    x: Tensor,
    g: Tensor,
    targets: Mapping[str, Mapping[str, Statistic]],
) -> Tensor:
    """Gradient at the block's input from the one at its output; the statistics see what passes in between."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for path in targets:

        def hook(_m: nn.Module, args: tuple[Tensor, ...], out: Tensor, path: str = path) -> None:
            out.retain_grad()
            seen[path] = (args[0].detach(), out)

        handles.append(block.get_submodule(path).register_forward_hook(hook))
    try:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = stream.run(block, layer, i, x)
            with _expected():
                out.backward(g)
    finally:
        for handle in handles:
            handle.remove()
    mask = stream.mask(i)
    for path, (inputs, output) in seen.items():
        gradient = output.grad
        if gradient is None:
            continue
        for statistic in targets[path].values():
            if "inputs" in statistic.needs:
                statistic.update(inputs, gradient, mask)
            else:
                statistic.update(gradient, mask)
    assert x.grad is not None
    return x.grad


@contextlib.contextmanager
def _expected() -> Iterator[None]:
    """Say it plainly if an operation of the model, such as a quantized one, lets no gradient through."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" in str(error) or "have been used in the graph" in str(error):
            raise NoGradients("this model lets no gradient through") from None
        raise


@contextlib.contextmanager
def _frozen(block: nn.Module):  # type: ignore[no-untyped-def]
    """Only activations need gradients here: weight gradients would cost a third of the work and one block of memory."""
    before = [(p, p.requires_grad) for p in block.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
