"""One exact backward pass through a model of which one block at a time is in memory.

Forward through the blocks, keeping only their inputs; the loss behind the last one; then backwards block by block,
recomputing each. Twice the forward cost of ordinary back-propagation's, and never more than one block of weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corank.engine.stream import Stream
from corank.model import Calibration, ResidentModel, Site
from corank.statistics import STATISTICS, FisherDiagonal, Statistic

ACTIVATION_BYTES = 1 << 31
"""Block inputs kept at once; more sequences than fit are swept in several rounds."""


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Sum over the samples of each sample's mean negative log-likelihood per token.

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
    return ((nll * weight).sum(1) / weight.sum(1).clamp_min(1)).sum()


def sweep(
    source: ResidentModel,
    data: Calibration,
    batch: int,
    sites: Iterable[Site],
    names: Iterable[str],
    report: Callable[[int, str], None],
) -> dict[str, dict[str, Statistic]]:
    """Gradient statistics of every site.

    Args:
        source: the model.
        data: calibration windows.
        batch: sequences per forward pass.
        sites: where.
        names: among "fisher" and "gradient".
        report: called with (layer, stage) as the sweep proceeds.

    Returns:
        site name -> name of the statistic -> the statistic.
    """
    names, sites = list(names), list(sites)
    statistics: dict[str, dict[str, Statistic]] = {
        s.name: {n: STATISTICS[n](*(s.shape if n == "fisher" else s.shape[:1])) for n in names} for s in sites
    }
    by_layer = {layer: [s for s in sites if s.layer == layer] for layer in {s.layer for s in sites}}
    layers, lowest = source.outline.layers, min(by_layer)
    causal = source.model.can_generate()
    stream = Stream(source, data, batch)
    per_batch = max(layers * stream.hidden[0].numel() * stream.hidden[0].element_size(), 1)
    round_size = max(1, ACTIVATION_BYTES // per_batch)
    for start in range(0, len(stream), round_size):
        chunk = range(start, min(start + round_size, len(stream)))
        inputs: list[list[Tensor]] = []
        hidden = [stream.hidden[i] for i in chunk]
        for layer in range(layers):
            report(layer, "forward")
            inputs.append(hidden)
            with source.block(layer) as block, torch.no_grad():
                hidden = [stream.run(block, layer, i, h) for i, h in zip(chunk, hidden, strict=True)]
        gradients = []
        with source.outside(head=True):
            for i, h in zip(chunk, hidden, strict=True):
                h = h.detach().requires_grad_()
                ids, mask = stream.ids[i].to(h.device), stream.mask(i)
                loss = next_token_loss(source.logits(ids, mask, h), ids, mask, causal)
                gradients.append(torch.autograd.grad(loss, h)[0])
        for layer in reversed(range(lowest, layers)):
            report(layer, "backward")
            with source.block(layer) as block, _frozen(block):
                prefix = f"{source.outline.blocks}.{layer}."
                targets = {s.name.removeprefix(prefix): statistics[s.name] for s in by_layer.get(layer, [])}
                gradients = [
                    _backward(stream, block, layer, i, x, g, targets)
                    for i, x, g in zip(chunk, inputs[layer], gradients, strict=True)
                ]
            inputs[layer] = []
    return statistics


def _backward(
    stream: Stream, block: nn.Module, layer: int, i: int, x: Tensor, g: Tensor, targets: dict[str, dict[str, Statistic]]
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
            if isinstance(statistic, FisherDiagonal):
                statistic.update(inputs, gradient, mask)
            else:
                statistic.update(gradient, mask)
    assert x.grad is not None
    return x.grad


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
