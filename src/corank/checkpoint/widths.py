"""Blocks of different widths: made before the weights are loaded, so that no class of the model has to be copied."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from corank.checkpoint.config import QUANT_METHOD
from corank.checkpoint.skeleton import resolve
from corank.errors import CorankError
from corank.factors import shape_of
from corank.model.archs import is_linear, role_of
from corank.model.outline import lists_of_blocks
from corank.model.site import Site
from corank.structured.convolutions import resize
from corank.structured.maps import map_residual
from corank.structured.native import switch_biases_on
from corank.structured.shape import BlockShape, narrow_empty, set_attributes, shape_of_block
from corank.structured.widen import widen


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


def widths_of(config: Any) -> dict[str, Any] | None:
    """The widths of blocks that a configuration was stored with, as in `CorankConfig`; None if it says them itself."""
    section = getattr(config, "quantization_config", None)
    known = section if isinstance(section, Mapping) else vars(section) if section is not None else {}
    return known.get("shape") if known.get("quant_method") == QUANT_METHOD else None


def only_narrow(section: Mapping[str, Any] | None) -> bool:
    """Whether a model is dense although it has a `quantization_config`: only the widths of its blocks are its own."""
    section = section or {}
    return section.get("quant_method") == QUANT_METHOD and bool(section.get("shape")) and not section.get("modules")


def block_shapes(config: Any, blocks: Sequence[Sequence[Site]]) -> list[BlockShape]:
    """The widths of all blocks of a model, narrowed before or not.

    Args:
        config: of the model.
        blocks: the matrices of each.

    Raises:
        CorankError: a block has no feed-forward network or no attention whose widths could be found.
    """
    stored = widths_of(config)
    if stored is None:
        return [shape_of_block(config, sites) for sites in blocks]
    return [BlockShape.from_dict(each) for each in stored["blocks"]]


def narrow_blocks(model: Any, shape: Mapping[str, Any]) -> None:
    """Give the blocks of a freshly built model the widths of a checkpoint.

    Args:
        model: without weights, as its configuration describes it.
        shape: as in `CorankConfig`.

    Raises:
        CorankError: the widths are not those of a model like this.
    """
    if shape.get("tensors"):
        resize(model, shape["tensors"], resolve)
        return
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
    if shape.get("residual"):
        prefixes = [f"{path}.{layer}." for layer in range(len(blocks))]
        every = [matrices_of(block, prefix, i) for i, (block, prefix) in enumerate(zip(blocks, prefixes, strict=True))]
        roles = [{s.role: s.name.removeprefix(p) for s in sites} for p, sites in zip(prefixes, every, strict=True)]
        map_residual(model, path, roles, [int(width) for width in shape["residual"]])


def restore_widths(model: Any, shape: Mapping[str, Any] | None) -> None:
    """Give the blocks of a dense model the widths that its configuration describes, in place; it computes the same.

    Args:
        model: whose factors have been multiplied out.
        shape: as in `CorankConfig`, None if the configuration says all widths.
    """
    if shape is None:
        return
    with torch.device("meta"):
        plain = type(model)(model.config)
    path = next(iter(lists_of_blocks(plain)))
    sources: Any = plain.get_submodule(path)
    blocks: Any = model.get_submodule(path)
    biased: dict[str, None] = {}
    for layer, (block, source) in enumerate(zip(blocks, sources, strict=True)):
        prefix = f"{path}.{layer}."
        sites = matrices_of(source, prefix, layer)
        before, after = BlockShape.from_dict(shape["blocks"][layer]), shape_of_block(model.config, sites)
        widen(block, sites, prefix, model.config, before, after)
        biased |= dict.fromkeys(before.biases)
    if biased and not switch_biases_on(model, dataclasses.replace(after, biases=tuple(biased))):
        warnings.warn(
            f"{', '.join(biased)} have got a bias that this architecture does not store; "
            "a dense checkpoint saved from this model will lose it when loaded.",
            stacklevel=3,
        )


def refuse_narrow(shape: Mapping[str, Any] | None) -> None:
    """Some narrowed models are as plain as they can be: no configuration describes what they are made of.

    Raises:
        CorankError: this is one.
    """
    if shape is not None and shape.get("residual"):
        raise CorankError(
            "The residual stream of this model passes through maps between bases, which no plain configuration describes; "
            "compress the dense model with rotations=one for an ordinary checkpoint."
        )
    if shape is not None and shape.get("tensors"):
        raise CorankError(
            "The feature maps of this model have widths of their own, which no plain configuration describes; "
            "compress the dense model with uniform=true for an ordinary checkpoint."
        )
