"""LoRA that starts as a part of the weight: PEFT's own layer, with A and B set and the part taken out of W."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from corank.adaptation import Adaptation
from corank.errors import CorankError
from corank.factorize import Measured
from corank.factors import is_conv1d, weight_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

UNCONVERTED = "(the adapter starts as a part of the weights: write it with corank.adapters.save to load it with PEFT)"
"""Put in the place of an initialisation. PEFT stops at a name it does not know, instead of adding the adapter to weights
that still hold the part, and shows it."""


def started(
    model: PreTrainedModel,
    method: str,
    plan: Adaptation,
    rank_of: Mapping[str, int],
    measured: Mapping[str, Measured],
    common: Mapping[str, Any],
) -> PeftModel:
    """LoRA on the named layers, each starting as the part of its weight that the method chooses.

    With the scale 1 the weight becomes W - B A, computed from A and B as they are stored, so that the sum is W up to the rounding of
    the weight's own dtype.
    """
    import peft

    assert plan.choose is not None
    parts = {
        name: plan.choose(weight_of(model.get_submodule(name)), measured.get(name), rank)
        for name, rank in rank_of.items()
    }
    config = peft.LoraConfig(
        r=plan.rank,
        lora_alpha=plan.rank,
        rank_pattern={f"^{name}": rank for name, rank in rank_of.items() if rank != plan.rank},
        alpha_pattern={f"^{name}": rank for name, rank in rank_of.items() if rank != plan.rank},
        fan_in_fan_out=all(is_conv1d(model.get_submodule(name)) for name in rank_of),
        **common,
    )
    adapted = peft.get_peft_model(model, config)
    base: Any = adapted.get_base_model()
    with torch.no_grad():
        for name, (B, A) in parts.items():
            layer = base.get_submodule(name)
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
            start = (layer.lora_B["default"].weight.clone(), layer.lora_A["default"].weight.clone())
            _take_out(layer.get_base_layer(), start[0].double() @ start[1].double())
            layer.corank_start = {"default": start}  # in a dict: not part of the model
    config.init_lora_weights = f"corank {method} {UNCONVERTED}"  # type: ignore[assignment]
    return adapted


def _take_out(layer: Any, part: Tensor) -> None:
    stored = part.mT if is_conv1d(layer) else part
    layer.weight.data = (layer.weight.double() - stored).to(layer.weight.dtype)


def has_start(model: Any, adapter: str) -> bool:
    """Whether an adapter of a PEFT model starts as a part of the weights."""
    return any(adapter in getattr(layer, "corank_start", {}) for layer in model.modules())


def plain_lora(model: Any, adapter: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """What has been learned since the start as an ordinary LoRA of twice the rank on the original weights.

    B A - B0 A0 = [B, -B0] [A; A0]; as PEFT converts its own initialisations.

    Returns:
        (configuration, state as PEFT saves it).

    Raises:
        CorankError: the adapter does not start as a part of the weights.
    """
    import copy

    from peft import get_peft_model_state_dict

    if not has_start(model, adapter):
        raise CorankError(f"The adapter {adapter!r} is not one that starts as a part of the weights.")
    state = {key: value.detach() for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items()}
    for name, layer in model.named_modules():
        if adapter in getattr(layer, "corank_start", {}):
            B0, A0 = layer.corank_start[adapter]
            for part, old, dim in (("lora_A", A0, 0), ("lora_B", -B0, 1)):
                key = f"{name}.{part}.weight"
                state[key] = torch.cat([state[key], old.to(state[key])], dim)
    config = copy.deepcopy(model.peft_config[adapter])
    config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, 2 * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    return config, state
