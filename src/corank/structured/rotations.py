"""The residual stream in a basis of its own at every place (SliceGPT, arXiv:2401.15024).

RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q, so the stream may be written in another basis at every place: with Q_i the one
of place i, what reads it becomes W diag(gamma) Q_i, what writes to it Q_i^T W, and the stream passes from place i to place j
by Q_j^T Q_i. Each Q_i has the leading principal components of what is there, behind all that has been cut before. The two ends are
not cut where that costs more than it saves: the last place never is, so that the last norm and the head stay as they are, and
the first one is not if the head is the embedding, which can stay so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factors import weight_of
from corank.statistics import InputGram
from corank.structured.maps import MAPS, NORMS, READERS, WRITERS, add_map, parameters_of, read_in
from corank.structured.narrow import put
from corank.structured.residual import Sliced, check_family, normalised
from corank.structured.task import Task


def slice_each(task: Task) -> Sliced:
    """Cut the residual stream of a model in memory, in place, to what the budget allows, every place in its own basis.

    Raises:
        CorankError: a model of another family, or a budget that leaves nothing.
    """
    model: Any = task.source.model
    check_family(model)
    d = model.config.get_text_config().hidden_size
    with task.stage("choose widths"):
        widths = places(task, d)
    if widths is not None:
        with task.stage("narrow"):
            kept = rotate_each(task, widths)
    sites = [s for layer in range(task.layers) for s in task.sites(layer)]
    sizes: Any = {s.name: tuple(weight_of(model.get_submodule(s.name)).shape) for s in sites}
    if widths is None:
        return Sliced(d, sizes, 1.0)
    beside: dict[str, int] = {}
    for layer in range(task.layers):
        block = model.get_submodule(task.source.outline.path(layer))
        beside |= {s.name: block.get_submodule(MAPS[WRITERS.index(s.role)]).weight.numel()
                   for s in task.sites(layer) if s.role in WRITERS}  # fmt: skip
    return Sliced(min(widths), sizes, kept, tuple(widths), beside)


def places(task: Task, d: int) -> list[int] | None:
    """Widths of all places: the largest one within the budget, but for the ends; None if nothing has to go."""
    model: Any = task.source.model
    outline = task.source.outline
    shapes = [{s.role: s.shape for s in task.sites(layer)} for layer in range(task.layers)]
    tied = _tied(model)
    limit = task.limit if not task.whole else task.limit + outline.parameters - sum(task.costs)
    inside = sum(s.numel for layer in range(task.layers) for s in task.sites(layer))
    if limit >= (outline.parameters if task.whole else inside):
        return None
    step = min(task.recipe.multiple_of, d)
    for width in range((d - 1) // step * step, 0, -step):
        widths = [d if tied else width, *[width] * (2 * task.layers - 1), d]
        count = parameters_of(shapes, widths)
        if task.whole:
            count += _around(task, widths, d) - inside
        if count <= limit:
            return widths
    raise CorankError(f"The budget ({task.budget.describe()}) leaves nothing of {d} dimensions; keep more.")


def _around(task: Task, widths: list[int], d: int) -> int:
    """Parameters of the model at these widths if its matrices kept theirs."""
    model: Any = task.source.model
    outline, total = task.source.outline, task.source.outline.parameters
    total += model.get_input_embeddings().weight.numel() // d * (widths[0] - d)
    for layer in range(task.layers):
        block = model.get_submodule(outline.path(layer))
        for which in (0, 1):
            before, after = widths[2 * layer + which : 2 * layer + which + 2]
            writer = next(s for s in task.sites(layer) if s.role == WRITERS[which])
            biased = getattr(block.get_submodule(outline.local(writer)), "bias", None) is not None
            total += before - d + (after - d if biased else 0)
    return total


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def rotate_each(task: Task, widths: list[int]) -> float:
    """Write a model in a basis of its own at every place.

    Args:
        task: whose model is changed.
        widths: of all places, 2 L + 1; d: nothing is cut there, and the basis stays as it is.

    Returns:
        share of the energy of the stream that is left, the mean over the places that are cut.
    """
    assert task.data is not None, "the recipe names no statistics"
    model: Any = task.source.model
    outline, d = task.source.outline, model.config.get_text_config().hidden_size
    stream = Stream(task.source, task.data, task.batch)
    shares: list[float] = []
    embedding = model.get_input_embeddings()
    Q = _basis(_gram(stream), widths[0], shares)
    if widths[0] != d:
        table = embedding.weight
        embedding.weight = nn.Parameter((table.double() @ Q).to(table.dtype), requires_grad=table.requires_grad)
        embedding.embedding_dim = widths[0]
    stream.hidden = [(h.double() @ Q).to(h.dtype) for h in stream.hidden]
    for layer in range(outline.layers):
        task.report(layer, "narrow", None)
        block = model.get_submodule(outline.path(layer))
        paths = {s.role: outline.local(s) for s in outline.in_layer(layer)}
        dtype = next(block.parameters()).dtype
        for which in (0, 1):
            gains = read_in(block.get_submodule(NORMS[which]), Q, d)
            for role in READERS[which]:
                old: Any = block.get_submodule(paths[role])
                put(block, paths[role], (weight_of(old).double() * gains) @ Q, old.bias)
            # what comes out is in the basis of the model as it was, so that its own can be found
            add_map(block, which, Q.to(dtype))
            width = widths[2 * layer + which + 1]
            if which == 0:
                gram = InputGram(d)
                for i in range(len(stream)):
                    look = {NORMS[1]: lambda x, mask, gram=gram: gram.update(normalised(x), mask)}
                    stream.observe(block, layer, i, look, stop=True)
                P = _basis(gram, width, shares)
            else:
                made = [stream.run(block, layer, i) for i in range(len(stream))]
                stream.hidden = made
                P = _basis(_gram(stream), width, shares)
                stream.hidden = [(h.double() @ P).to(h.dtype) for h in made]
            add_map(block, which, (P.T @ Q).to(dtype))
            old = block.get_submodule(paths[WRITERS[which]])
            bias = None if old.bias is None else P.T @ old.bias.double()
            put(block, paths[WRITERS[which]], P.T @ weight_of(old).double(), bias)
            Q = P
    return sum(shares) / len(shares) if shares else 1.0


def _gram(stream: Stream) -> InputGram:
    """Second moment of the stream as it is, every token divided by its root mean square."""
    gram = InputGram(stream.hidden[0].shape[-1])
    for i, x in enumerate(stream.hidden):
        gram.update(normalised(x), stream.mask(i))
    return gram


def _basis(gram: InputGram, width: int, shares: list[float]) -> Tensor:
    """The leading principal components [d, width]; the identity where nothing is cut."""
    second = gram.result().G
    if width == len(second):
        return torch.eye(width, dtype=torch.float64, device=second.device)
    values, vectors = torch.linalg.eigh(second)
    total = float(values.sum())
    shares.append(float(values[-width:].sum()) / total if total > 0 else 1.0)
    return vectors.flip(1)[:, :width]
