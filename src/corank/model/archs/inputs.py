"""Something of the right shape to run a model on the meta device with, whatever it takes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from corank.errors import CorankError

SOURCE, TARGET = 8, 6
"""Tokens on the encoder's (or the only) side and on the decoder's: different, so that one can tell them apart."""


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of one example on the meta device.

    Args:
        model: on the meta device; its `main_input_name` and configuration say what it takes.

    Raises:
        CorankError: neither text, nor images, nor audio features.
    """
    config, name = model.config, model.main_input_name
    ids = torch.zeros(1, SOURCE, dtype=torch.long, device="meta")
    inputs: dict[str, Tensor]
    if name == "input_ids":
        inputs = {"input_ids": ids}
    elif name == "pixel_values":
        size = getattr(config, "image_size", 64) or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        inputs = {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width, device="meta")}
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions  # a convolution of stride 2 halves them
        inputs = {name: torch.zeros(1, config.num_mel_bins, frames, device="meta")}
    else:
        raise CorankError(
            f"{type(model).__name__} takes {name!r}, of which corank does not know the shape; give calibration data as "
            "a list of dicts of model inputs (data=[{...}, ...])."
        )
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, TARGET, dtype=torch.long, device="meta")
    return inputs


def meta_inputs(example: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of an example without its content."""
    return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in example.items()}
