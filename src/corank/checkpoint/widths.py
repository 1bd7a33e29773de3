"""Blocks of different widths: made before the weights are loaded, so that no class of the model has to be copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from corank.errors import CorankError
from corank.factors import shape_of
from corank.model.archs import is_linear, role_of
from corank.model.outline import lists_of_blocks
from corank.model.site import Site
from corank.structured.shape import BlockShape, narrow_empty, set_attributes, shape_of_block


def matrices_of(block: nn.Module, prefix: str, layer: int) -> list[Site]:
    """The linear layers of a block, in the order in which it defines them.

    Args:
        prefix: path of the block, with a dot at the end.
        layer: its number.
    """
    return [
        Site(prefix + path, role_of(path), layer, shape_of(module), prefix + path, module.bias is not None)
        for path, module in block.named_modules()
        if path and is_linear(module)
    ]


def narrow_blocks(model: Any, shape: Mapping[str, Any]) -> None:
    """Give the blocks of a freshly built model the widths of a checkpoint.

    Args:
        model: without weights, as its configuration describes it.
        shape: as in `CorankConfig`.

    Raises:
        CorankError: the widths are not those of a model like this.
    """
    widths = [BlockShape.from_dict(each) for each in shape.get("blocks", ())]
    path = next(iter(lists_of_blocks(model)))
    blocks: Any = model.get_submodule(path)
    if len(blocks) != len(widths):
        raise CorankError(
            f"config.json holds the widths of {len(widths)} blocks and this model has {len(blocks)}; "
            "config.json does not belong to this model."
        )
    for layer, (block, after) in enumerate(zip(blocks, widths, strict=True)):
        prefix = f"{path}.{layer}."
        sites = matrices_of(block, prefix, layer)
        before = shape_of_block(model.config, sites)
        narrow_empty(block, sites, prefix, before, after)
        set_attributes(block, model.config, before, after)


def refuse_narrow(shape: Mapping[str, Any] | None) -> None:
    """A model whose blocks have widths of their own is as dense as it can be.

    Raises:
        CorankError: it has.
    """
    if shape is not None:
        raise CorankError(
            "The blocks of this model have widths of their own, which no plain configuration describes; compress the dense "
            "model with uniform=true for an ordinary checkpoint."
        )
