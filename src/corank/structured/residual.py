"""Fewer dimensions in the residual stream, the same ones between all blocks.

RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q, so a model may be written in any basis of its residual stream: producers
Q^T W, consumers W diag(gamma) Q, embeddings E Q. Cut to the leading d' principal components of what the norms see, it is a
model of the same family with another hidden size (SliceGPT, arXiv:2401.15024, with one basis for all places, which needs no
maps between bases). A norm of d' entries divides by the root of their mean square, sqrt(d / d') too much: the norm's gain
makes up for it, and eps becomes eps d / d'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factors import weight_of
from corank.statistics import InputGram
from corank.structured.maps import FAMILIES
from corank.structured.narrow import put
from corank.structured.task import Task

CONSUMERS = {"input_layernorm": ("q", "k", "v"), "post_attention_layernorm": ("gate", "up")}
"""Norms of a block -> roles of the matrices that read them."""


@dataclass(frozen=True)
class Sliced:
    """What became of a model.

    Attributes:
        width: dimensions of the residual stream now.
        sizes: name of a matrix -> its shape now.
        kept: share of the energy of the residual stream that is left, None where that is not known.
        widths: of all places of the stream, where they have bases of their own; empty if they share one.
        beside: name of a matrix -> parameters of the map that the stream passes through beside it.
    """

    width: int
    sizes: dict[str, tuple[int, int]]
    kept: float | None
    widths: tuple[int, ...] = ()
    beside: Mapping[str, int] = field(default_factory=dict)


def slice_residual(task: Task) -> Sliced:
    """Cut the residual stream of a model in memory, in place, to what the budget allows; its configuration too.

    Raises:
        CorankError: a model of another family, or a budget that leaves nothing.
    """
    model: Any = task.source.model
    check_family(model)
    d = model.config.get_text_config().hidden_size
    sites = [s for layer in range(task.layers) for s in task.sites(layer)]
    width = _width(task, d, sum(s.numel for s in sites))
    if width == d:
        return Sliced(d, {s.name: s.shape for s in sites}, 1.0)
    with task.stage("choose widths"):
        second = residual_moment(task)
    with task.stage("narrow"):
        values, vectors = torch.linalg.eigh(second)
        rotate(model, task, vectors.flip(1)[:, :width])
    kept = float(values[-width:].sum() / values.sum()) if float(values.sum()) > 0 else 1.0
    sizes = {s.name: tuple(weight_of(model.get_submodule(s.name)).shape) for s in sites}
    return Sliced(width, sizes, kept)  # type: ignore[arg-type]


def check_family(model: Any) -> None:
    """Refuse a model whose residual stream is read otherwise.

    Raises:
        CorankError: it is of another family.
    """
    if model.config.get_text_config().model_type not in FAMILIES or hasattr(model, "language_model"):
        raise CorankError(
            f"The residual stream of {type(model).__name__} cannot be cut: that is for the families {', '.join(FAMILIES)}; "
            "narrow blocks instead (modegpt)."
        )


def _width(task: Task, d: int, dense: int) -> int:
    """The largest width within the budget; every matrix of a block has one side in the residual stream."""
    step = min(task.recipe.multiple_of, d)
    if not task.whole:
        width = d if task.limit >= dense else int(task.limit * d // dense // step * step)
    else:
        fixed, scaled = _counts(task)
        limit = task.limit + task.source.outline.parameters - sum(task.costs)
        width = d if limit >= task.source.outline.parameters else int((limit - fixed) * d // scaled // step * step)
    if width < step:
        raise CorankError(f"The budget ({task.budget.describe()}) leaves nothing of {d} dimensions; keep more.")
    return width


def _counts(task: Task) -> tuple[int, int]:
    """Parameters of the whole model that do not depend on the width, and those that do, at the full one.

    A head that is the embedding counts twice: it becomes a matrix of its own.
    """
    model, outline = task.source.model, task.source.outline
    fixed = 0
    for layer in range(task.layers):
        block = model.get_submodule(outline.path(layer))
        sites = task.sites(layer)
        scaled = {outline.local(s) + ".weight" for s in sites} | {f"{norm}.weight" for norm in CONSUMERS}
        scaled |= {outline.local(s) + ".bias" for s in sites if s.role in ("o", "down")}
        fixed += sum(p.numel() for name, p in block.named_parameters() if name not in scaled)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    twice = model.get_input_embeddings().weight.numel() if tied else 0
    return fixed, outline.parameters - fixed + twice


def residual_moment(task: Task) -> Tensor:
    """E[x x^T] of what norms see, each token divided by its root mean square, over all norms: float64 [d, d]."""
    assert task.data is not None, "the recipe names no statistics"
    source, statistic = task.source, None
    stream = Stream(source, task.data, task.batch)
    with torch.no_grad():
        for layer in range(task.layers):
            task.report(layer, "measure", None)
            with source.block(layer) as block:
                for i in range(len(stream)):
                    width = stream.hidden[i].shape[-1]
                    statistic = statistic or InputGram(width)

                    def look(x: Tensor, mask: Tensor | None, statistic: InputGram = statistic) -> None:
                        statistic.update(normalised(x), mask)

                    out = stream.observe(block, layer, i, dict.fromkeys(CONSUMERS, look))
                    assert out is not None
                    stream.hidden[i] = out
        assert statistic is not None
        for i, x in enumerate(stream.hidden):  # the last norm's
            statistic.update(normalised(x), stream.mask(i))
    return statistic.result().G


def normalised(x: Tensor) -> Tensor:
    """Each token divided by its root mean square, in float32 at least."""
    x = x.float() if x.dtype != torch.float64 else x
    return x * x.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


@torch.no_grad()
def rotate(model: Any, task: Task, Q: Tensor) -> None:
    """Write a model in another basis of its residual stream.

    Args:
        model: in memory; changed, its configuration too. A head that is the embedding becomes one of its own.
        task: whose outline says where the matrices are.
        Q: [d, d'] with orthonormal columns.
    """
    d, width = Q.shape
    gain, outline = (d / width) ** 0.5, task.source.outline
    text: Any = model.config.get_text_config()
    for layer in range(outline.layers):
        block = model.get_submodule(outline.path(layer))
        sites = {s.role: outline.local(s) for s in outline.in_layer(layer)}
        for norm, roles in CONSUMERS.items():
            gamma = block.get_submodule(norm).weight.double()
            for role in roles:
                old: Any = block.get_submodule(sites[role])
                put(block, sites[role], (weight_of(old).double() * gamma) @ Q, old.bias)
            _plain(block.get_submodule(norm), width, gain, text.rms_norm_eps * d / width)
        for role in ("o", "down"):
            old = block.get_submodule(sites[role])
            put(
                block, sites[role], Q.T @ weight_of(old).double(), None if old.bias is None else Q.T @ old.bias.double()
            )
    embedding, head, norm = (
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        _last_norm(model, outline.blocks),
    )
    table, dtype = embedding.weight.double(), embedding.weight.dtype
    if head is not None:
        W = head.weight.double() * norm.weight.double()
        head.weight = nn.Parameter((W @ Q).to(dtype), requires_grad=head.weight.requires_grad)
        head.in_features = width
    embedding.weight = nn.Parameter((table @ Q).to(dtype), requires_grad=embedding.weight.requires_grad)
    embedding.embedding_dim = width
    _plain(norm, width, gain, text.rms_norm_eps * d / width)
    text.head_dim = getattr(text, "head_dim", None) or d // text.num_attention_heads
    text.hidden_size, text.rms_norm_eps = width, text.rms_norm_eps * d / width
    model.config.tie_word_embeddings = text.tie_word_embeddings = False


def _last_norm(model: nn.Module, blocks: str) -> Any:
    """The norm behind the last block, beside the list of blocks."""
    return model.get_submodule(f"{blocks.rpartition('.')[0]}.norm")


def _plain(norm: Any, width: int, gain: float, eps: float) -> None:
    norm.weight = nn.Parameter(torch.full_like(norm.weight[:width], gain), requires_grad=norm.weight.requires_grad)
    norm.variance_epsilon = eps
