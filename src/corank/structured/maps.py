"""Blocks between whose parts the residual stream changes its basis, or its width.

A stock block adds what attention and the feed-forward network make to the residual stream as it is. Here the stream passes
through a linear map beside each of them,

    h' = S_a h + attention(norm(h)),    h'' = S_f h' + feed-forward(norm(h'))

so that every place may have a basis and a width of its own: SliceGPT (arXiv:2401.15024), SP3 (arXiv:2308.16475). The places
are numbered from 0, what the first block is given, to 2 L, what the last one makes; block l reads place 2 l, has place 2 l + 1
inside and hands place 2 l + 2 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.factors import shape_of
from corank.structured.shape import empty_linear

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose residual stream is read through norms without a mean and nothing else."""
NORMS = ("input_layernorm", "post_attention_layernorm")
READERS = (("q", "k", "v"), ("gate", "up"))
"""Roles of the matrices that read each of these norms."""
WRITERS = ("o", "down")
MAPS = ("attention_map", "feed_forward_map")


class MappedResidual(nn.Module):
    """What a block with maps computes; the stock class beside it gives everything else."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[batch, tokens, width of the first place] -> [batch, tokens, width of the last]."""
        block: Any = self
        attended, _ = block.self_attn(block.input_layernorm(hidden_states), *args, **kwargs)
        hidden_states = block.attention_map(hidden_states) + attended
        fed = block.mlp(block.post_attention_layernorm(hidden_states))
        return block.feed_forward_map(hidden_states) + fed


@cache
def mapped(block_class: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks with maps for a stock class, under its name, by which devices are assigned to whole blocks."""
    return type(block_class.__name__, (MappedResidual, block_class), {"__module__": block_class.__module__})


def is_mapped(model: nn.Module) -> bool:
    """Whether any block of a model has maps."""
    return any(isinstance(module, MappedResidual) for module in model.modules())


def add_map(block: nn.Module, which: int, weight: Tensor) -> None:
    """Set one of the two maps of a block, which becomes one with maps.

    Args:
        block: of one of `FAMILIES`.
        which: 0 beside attention, 1 beside the feed-forward network.
        weight: [out, in].
    """
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=next(block.parameters()).requires_grad)
    setattr(block, MAPS[which], layer.train(block.training))
    if not isinstance(block, MappedResidual):
        block.__class__ = mapped(type(block))  # type: ignore[arg-type]


def size_norm(norm: Any, width: int, d: int) -> None:
    """Give a norm of d entries another width, without values.

    It divides by the root mean square of what is there; what is not is zero, which eps has to know and the gains make up for.
    """
    if width != d:
        norm.weight = nn.Parameter(norm.weight.new_empty(width), requires_grad=norm.weight.requires_grad)
        norm.variance_epsilon *= d / width


def map_residual(model: Any, path: str, roles: Sequence[Mapping[str, str]], widths: Sequence[int]) -> None:
    """Give a freshly built model the widths of a checkpoint with maps, before its weights are loaded.

    Args:
        model: as its configuration describes it.
        path: of its list of blocks.
        roles: for every block, role -> path inside it.
        widths: of all places, 2 L + 1.

    Raises:
        CorankError: the widths are not those of a model like this.
    """
    text = model.config.get_text_config()
    blocks: Any = model.get_submodule(path)
    if len(widths) != 2 * len(blocks) + 1 or min(widths) < 1 or text.model_type not in FAMILIES:
        raise CorankError(
            f"config.json holds {len(widths)} widths of the residual stream for {len(blocks)} blocks of {text.model_type}; it "
            "does not belong to this model."
        )
    d = text.hidden_size
    for i, block in enumerate(blocks):
        for which in (0, 1):
            before, after = widths[2 * i + which : 2 * i + which + 2]
            for role in READERS[which]:
                old = block.get_submodule(roles[i][role])
                block.set_submodule(roles[i][role], empty_linear(old, shape_of(old)[0], before, old.bias is not None))
            old = block.get_submodule(roles[i][WRITERS[which]])
            block.set_submodule(
                roles[i][WRITERS[which]], empty_linear(old, after, shape_of(old)[1], old.bias is not None)
            )
            size_norm(block.get_submodule(NORMS[which]), before, d)
            add_map(block, which, old.weight.new_empty(after, before))
    _size_ends(model, path, widths, d)


def _size_ends(model: Any, path: str, widths: Sequence[int], d: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = model.get_submodule(f"{path.rpartition('.')[0]}.norm" if "." in path else "norm")
    if widths[0] != d:
        embedding.weight = nn.Parameter(embedding.weight.new_empty(embedding.num_embeddings, widths[0]))
        embedding.embedding_dim = widths[0]
    size_norm(norm, widths[-1], d)
    if head is not None and widths[-1] != d:
        head.weight = nn.Parameter(head.weight.new_empty(head.out_features, widths[-1]))
        head.in_features = widths[-1]


def parameters_of(shapes: Sequence[Mapping[str, tuple[int, int]]], widths: Sequence[int]) -> int:
    """Parameters of the matrices of all blocks and of their maps.

    Args:
        shapes: for every block, role -> (out, in) at full width.
        widths: of all places.
    """
    total = 0
    for i, block in enumerate(shapes):
        for which in (0, 1):
            before, after = widths[2 * i + which : 2 * i + which + 2]
            total += sum(block[role][0] * before for role in READERS[which])
            total += after * block[WRITERS[which]][1] + after * before
    return total


@torch.no_grad()
def read_in(norm: Any, basis: Tensor, d: int) -> Tensor:
    """Let a norm read the stream in a basis; returns its gains [d], which the matrices behind it have to take over.

    Args:
        norm: of d entries.
        basis: [d, width] with orthonormal columns.
    """
    gains = norm.weight.detach().double()
    width = basis.shape[1]
    size_norm(norm, width, d)
    norm.weight = nn.Parameter(
        torch.full_like(norm.weight, (d / width) ** 0.5), requires_grad=norm.weight.requires_grad
    )
    return gains
