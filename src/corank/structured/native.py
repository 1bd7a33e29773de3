"""The configuration of the result: an ordinary one wherever there is one that describes it.

| class | what it is | loads |
|---|---|---|
| N0 | the configuration of a smaller model of the same family | anywhere |
| N1 | the same with biases switched on | anywhere |
| N2 | blocks of different widths | with ``import corank`` |
| N4 | some matrices are factors, or the residual stream passes through maps | with ``import corank`` |

Nothing is assumed about a configuration: a candidate is one whose model, built on the meta device, has exactly the tensors
of the result. Biases it wants and the result lacks are stored as zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from corank.errors import CorankError
from corank.model.outline import model_class
from corank.structured.rotation import head_size, with_pairs
from corank.structured.shape import BlockShape, Shape, narrowed_config

Sizes = Mapping[str, tuple[int, ...]]
"""Name of a tensor of a model -> its shape."""

BIASES = ("attention_bias", "mlp_bias")
"""Names under which configurations say that matrices have biases."""

#: families that compute the same graph, and differ in which biases they have and which head counts they accept
_RELATIVES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
#: per-layer settings that are numbers of layers, not one entry for each
_NUMBERS_OF_LAYERS = ("mlp_only_layers",)
#: what configurations raise when they are not content with their values
_REFUSALS = (ValueError, TypeError, StrictDataclassError)


@dataclass(frozen=True)
class Native:
    """How a result is described.

    Attributes:
        config: to be written.
        kind: "N0" to "N4".
        zeros: biases that the configuration has and the result has not, with their shapes.
        why: reason why no ordinary configuration describes it, empty if one does.
    """

    config: PretrainedConfig
    kind: str
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)
    why: str = ""


def describe(config: PretrainedConfig, shape: Shape, sizes: Sizes, factors: bool = False) -> Native:
    """The configuration for a result.

    Args:
        config: of the source.
        shape: what became of the blocks.
        sizes: the tensors of the result.
        factors: some matrices of the result are factorized modules.

    Raises:
        CorankError: the layers of this architecture differ in a way that its configuration cannot say once some are gone.
    """
    shorter = base(config, shape)
    if factors:
        return Native(shorter, "N4", why="some of its matrices are factors")
    if not shape.same:
        return Native(shorter, "N2", why="its blocks have different widths")
    narrow = narrowed_config(shorter, shape.blocks[0]) if shape.blocks else shorter
    biases = bool(shape.blocks and shape.blocks[0].biases)
    for candidate in _candidates(narrow, biases):
        wanted = sizes_of(candidate)
        if wanted is None:
            continue
        zeros = {name: size for name, size in wanted.items() if name not in sizes and name.endswith(".bias")}
        if {**sizes, **zeros} == wanted:
            return Native(candidate, "N1" if biases else "N0", zeros)
    if not shape.blocks:
        raise CorankError(
            f"The blocks of {type(config).__name__.removesuffix('Config')} are of different kinds, and its configuration "
            "cannot say which of them are left; use a method that keeps all blocks."
        )
    return Native(shorter, "N2", why=f"no configuration of {config.model_type} has these widths")


def describe_channels(config: PretrainedConfig, channels: Mapping[int, int], sizes: Sizes) -> Native:
    """The configuration for a convolutional network with fewer channels.

    Args:
        config: of the source.
        channels: how many a feature map had -> how many it has; empty if maps of one width have become different ones.
        sizes: the tensors of the result.
    """
    made = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if any(word in name for word in ("hidden_size", "embedding_size", "width", "out_channels")):
            several = isinstance(value, list | tuple) and all(isinstance(n, int) for n in value)
            if several or type(value) is int:
                setattr(made, name, [channels.get(n, n) for n in value] if several else channels.get(value, value))
    if channels and sizes_of(made) == dict(sizes):
        return Native(made, "N0")
    return Native(copy.deepcopy(config), "N2", why=f"no configuration of {config.model_type} has these channels")


def base(config: PretrainedConfig, shape: Shape) -> PretrainedConfig:
    """A copy of a configuration with what is the same for all blocks: their number, and the dimensions of their heads."""
    made = shortened(config, shape.kept)
    if shape.blocks and shape.blocks[0].pairs:  # all blocks have lost the same
        made = with_pairs(made, head_size(config), shape.blocks[0].pairs)
    return made


def sizes_of(config: PretrainedConfig) -> dict[str, tuple[int, ...]] | None:
    """Tensors of the model that a configuration describes, None if it describes none."""
    try:
        checked = AutoConfig.for_model(**config.to_dict())  # what loading will make of it, its validation included
        with torch.device("meta"):
            model = model_class(checked)(checked)
    except (*_REFUSALS, KeyError, AttributeError, RuntimeError, ZeroDivisionError):
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shortened(config: PretrainedConfig, kept: tuple[int, ...]) -> PretrainedConfig:
    """A copy of a configuration for fewer blocks: their number, and every list with an entry for each of them.

    Raises:
        CorankError: blocks depend on their number in a way that a renumbered one would not.
    """
    made = copy.deepcopy(config)
    text: Any = made.get_text_config()
    layers = int(text.num_hidden_layers)
    if kept == tuple(range(layers)):
        return made
    if getattr(text, "scale_attn_by_inverse_layer_idx", False):
        raise CorankError(
            "This model scales its attention by the number of the block (scale_attn_by_inverse_layer_idx), which changes "
            "when blocks go; use a method that keeps all blocks."
        )
    lists = {
        name: value
        for name, value in text.to_dict().items()
        if isinstance(value, list | tuple) and "layer" in name and len(value) == layers
    }
    lists = {name: value for name, value in lists.items() if name not in _NUMBERS_OF_LAYERS}
    text.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(text, name, [value[i] for i in kept])
    for name in _NUMBERS_OF_LAYERS:
        if getattr(text, name, None):
            setattr(text, name, [kept.index(i) for i in getattr(text, name) if i in kept])
    if hasattr(text, "attention_types") and "attention_layers" in lists:  # GPT-Neo says the same twice
        text.attention_types = [[list(text.attention_layers), 1]]
    return made


def add_zeros(model: nn.Module, zeros: Sizes) -> None:
    """Give a model the biases that its configuration has and it has not, as zeros."""
    for key, size in zeros.items():
        owner = model.get_submodule(key.removesuffix(".bias"))
        weight: Any = owner.weight
        owner.bias = nn.Parameter(weight.new_zeros(size), requires_grad=False)


def switch_biases_on(model: Any, shape: BlockShape) -> bool:
    """Let the configuration of a model say that it has the biases that it has; those that are missing become zero.

    Args:
        model: whose blocks have the widths of its configuration.
        shape: of its blocks, with their biases.

    Returns:
        whether a configuration of its family can say so.
    """
    sizes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    kept = tuple(range(int(model.config.get_text_config().num_hidden_layers)))
    described = describe(model.config, Shape(kept, (shape,) * len(kept)), sizes)
    if described.kind != "N1" or type(described.config) is not type(model.config):
        return False
    for flag in BIASES:
        if hasattr(model.config, flag):
            setattr(model.config, flag, getattr(described.config, flag))
    add_zeros(model, described.zeros)
    return True


def _candidates(config: PretrainedConfig, biases: bool) -> Iterator[PretrainedConfig]:
    """Configurations that may describe a result, the source's own family first."""
    flags = dict.fromkeys(BIASES, True) if biases else {}
    own = copy.deepcopy(config)
    for name, value in flags.items():
        if hasattr(own, name):
            setattr(own, name, value)
    yield own
    if biases and config.model_type in _RELATIVES:  # not all matrices need one
        for name in flags:
            if hasattr(config, name):
                one = copy.deepcopy(config)
                setattr(one, name, True)
                yield one
    if not _plain_attention(config):
        return
    for family in _RELATIVES:
        if family != config.model_type:
            content = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
            content |= {"sliding_window": None, "use_sliding_window": False, **(flags if family == "llama" else {})}
            content = {k: v for k, v in content.items() if k not in ("layer_types", "max_window_layers")}
            try:
                yield AutoConfig.for_model(family, **content, architectures=[_RELATIVES[family]])
            except _REFUSALS:
                continue


def _plain_attention(config: PretrainedConfig) -> bool:
    """Whether a model is one of the related families, for text, without windows of attention."""
    named = (config.architectures or [_RELATIVES.get(config.model_type, "")])[0]
    windows = config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None
    windows = windows or bool(getattr(config, "use_sliding_window", False))
    return config.model_type in _RELATIVES and named == _RELATIVES[config.model_type] and not windows


def door(native: Native, shape: Shape) -> dict[str, Any] | None:
    """What the door of the checkpoint has to know about widths; None if the configuration says it all."""
    if native.kind in ("N0", "N1") or not shape.blocks:
        return None
    return {"blocks": [b.to_dict() for b in shape.blocks]}
