"""A block of a tiny model with calibration data, as the driver hands it over."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers as tf

from corank.engine.stream import Stream
from corank.model import ResidentModel
from corank.structured.block import Block
from corank.structured.recipe import Structured
from corank.structured.shape import BlockShape, shape_of_block
from tiny import GQA, MLP, SIZES, windows


def llama(seed: int = 0, **other: Any) -> Any:
    """A random float64 model whose feed-forward networks have biases, so that channels can be constant."""
    torch.manual_seed(seed)
    settings = {**SIZES, **MLP, **GQA, "mlp_bias": True, "tie_word_embeddings": False, **other}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**settings)).eval().double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.mul_(8.0)
            elif "bias" in name:
                p.normal_(std=0.3)
    return model


def block_of(
    model: Any, recipe: Structured, layer: int = 0, samples: int = 8, length: int = 16, padded: bool = False
) -> Block:
    """A block, with the calibration windows as the dense model hands them to it."""
    source = ResidentModel(model)
    plan = source.outline
    stream = Stream(source, windows(samples, length, padded=padded), samples)
    with torch.no_grad():
        for i in range(layer):
            stream.hidden = [stream.run(model.get_submodule(plan.path(i)), i, 0)]
    sites = plan.in_layer(layer)
    path = plan.path(layer)
    shape = shape_of_block(model.config, sites)
    dense = stream.copy() if recipe.anchored else None
    return Block(layer, model.get_submodule(path), sites, f"{path}.", shape, model.config, stream, recipe, dense=dense)


def narrower(
    shape: BlockShape, recipe: Structured, channels: int = 0, heads: int = 0, has_bias: bool = False
) -> BlockShape:
    """Widths with some channels and key-value heads less, and the biases that compensation brings."""
    groups = shape.heads // shape.kv_heads
    biases = []
    if recipe.compensate in ("bias", "affine-ls"):
        biases += ["self_attn.o_proj"] * bool(heads)
        biases += ["mlp.down_proj"] * bool(channels and not has_bias)
    return dataclasses.replace(
        shape,
        channels=shape.channels - channels,
        heads=shape.heads - heads * groups,
        kv_heads=shape.kv_heads - heads,
        biases=tuple(biases),
    )


@torch.no_grad()
def out(block: Block) -> torch.Tensor:
    """What the block, as it now is, makes of its calibration data."""
    return torch.cat([o.flatten(0, -2) for o in block.outputs()])
