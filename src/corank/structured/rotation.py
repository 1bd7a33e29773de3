"""Rotary embeddings of heads that have lost pairs of dimensions, in the words of an ordinary configuration.

The frequencies of the pairs that are left are no geometric series any more. A configuration can say any frequencies by the
kind "longrope", which divides theta^(-2i / r) by a factor of its own for each pair.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def head_size(config: PretrainedConfig) -> int:
    """Dimensions of a head of queries, as a configuration says it."""
    text: Any = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def frequencies(config: PretrainedConfig, h: int) -> Tensor:
    """What each pair of dimensions of a head is turned by per position: float64 [h / 2].

    Args:
        config: with rotary embeddings of a kind in `corank.structured.units.ROTATIONS`.
        h: dimensions of a head.
    """
    text: Any = config.get_text_config()
    rope = text.rope_parameters
    if rope["rope_type"] == "default":
        return rope["rope_theta"] ** (-torch.arange(0, h, 2, dtype=torch.float64) / h)
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](text, torch.device("cpu"))[0].double()


def with_pairs(config: PretrainedConfig, h: int, pairs: tuple[int, ...]) -> PretrainedConfig:
    """The configuration of heads that consist of some of the pairs of dimensions of the source's.

    Args:
        config: of the source.
        h: dimensions of its heads.
        pairs: that are left.

    Returns:
        a copy with another head size and other rotary embeddings.
    """
    made = copy.deepcopy(config)
    text: Any = made.get_text_config()
    r, theta = 2 * len(pairs), float(text.rope_parameters["rope_theta"])
    wanted = frequencies(config, h)[list(pairs)]
    factors = (theta ** (-torch.arange(0, r, 2, dtype=torch.float64) / r) / wanted).tolist()
    text.head_dim = r
    text.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": text.max_position_embeddings,
    }
    return made


def keep_pairs(model: nn.Module, h: int, pairs: tuple[int, ...]) -> None:
    """Let the rotary embeddings of a model in memory turn only the pairs that are left.

    Args:
        model: whose heads had h dimensions.
        pairs: that are left.
    """
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            found = module._buffers.get(name)
            if found is not None and len(found) == h // 2:
                module._buffers[name] = found[list(pairs)].clone()
