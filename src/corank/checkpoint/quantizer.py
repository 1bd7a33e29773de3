"""The door into `from_pretrained` and `save_pretrained`: transformers' quantizer interface."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers.integrations import is_fsdp_enabled
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from corank.checkpoint.config import QUANT_METHOD, CorankConfig, count_quantized
from corank.checkpoint.integers import need_torchao, plain, ready
from corank.checkpoint.skeleton import build, collect, factorized, restore_dense
from corank.checkpoint.verify import check_fingerprint, fingerprint
from corank.checkpoint.widths import narrow_blocks, refuse_narrow, restore_widths
from corank.errors import CorankError

FALLBACK_MODULE = "modeling_corank"


class CorankQuantizer(HfQuantizer):
    """Builds the factorized modules before the weights arrive and checks them afterwards.

    The modules compute with ordinary floating-point parameters, so the model can be cast, trained, compiled,
    saved and given adapters like any other. Where factors are stored as integers (`factor_quantization`), they are
    tensors of torchao: such a model takes adapters, but its factors do not train.
    """

    # Forbids from_pretrained(<dense>, quantization_config=CorankConfig(...)): compressing is not loading.
    requires_calibration = True
    quantization_config: CorankConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if (getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1) > 1:
            raise CorankError(
                "Factorized modules cannot be split by tensor parallelism here; load with device_map, "
                "or dequantize the model first."
            )
        if self.quantization_config.factor_quantization:
            need_torchao()
        if self.quantization_config.shape is not None:
            narrow_blocks(model, self.quantization_config.shape)
        build(model, self.quantization_config.modules)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        integers = ready(model)
        for layer in factorized(model).values():
            with align_module_device(layer):  # fetches what has been offloaded to disk
                layer.finalize()
        # Without integer weights nothing needs their protections: .half(), .float() and .to(dtype) are fine.
        model.is_quantized = integers > 0  # type: ignore[assignment]
        drop_fallback(model.config)
        if not is_fsdp_enabled():  # other ranks then hold placeholders until the weights are broadcast
            check_fingerprint(model, self.quantization_config.fingerprint or {})

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        refuse_narrow(self.quantization_config.shape)
        restore_dense(model)
        restore_widths(model, self.quantization_config.shape)
        drop_fallback(model.config)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Called by `save_pretrained` before it writes the config: bring the map and the norms up to date.

        The model may have been trained, or compressed further, since the config was made.

        Returns:
            (what to store where that is not the `state_dict` itself, no metadata).
        """
        config, given = self.quantization_config, _given()
        if not getattr(model, "_hf_peft_config_loaded", False):
            config.modules, config.fingerprint, config.files = collect(model), fingerprint(model, given), None
            config.factor_quantization = count_quantized(config.modules)
            model.config.quantization_config = config  # type: ignore[union-attr]
            if config.factor_quantization:
                return plain(model.state_dict() if given is None else given), {}
        return given, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The factors themselves can be trained; without this the Trainer insists on adapters."""
        return not self.quantization_config.factor_quantization

    @property
    def is_compileable(self) -> bool:
        return True


def _given() -> dict[str, torch.Tensor] | None:
    """The `state_dict` that `save_pretrained` was called with.

    transformers forgets it as soon as there is a quantizer. Where a trainer has gathered it from all ranks it cannot
    be had again: by then rank 0 is alone, and its own parameters are shards.
    """
    caller = sys._getframe(2)
    return caller.f_locals.get("state_dict") if caller.f_code.co_name == "save_pretrained" else None


def drop_fallback(config: Any) -> None:
    """Forget the `auto_map` entries of the shipped fallback, whose file `save_pretrained` does not copy."""
    auto_map = {k: v for k, v in (getattr(config, "auto_map", None) or {}).items() if FALLBACK_MODULE not in str(v)}
    if auto_map:
        config.auto_map = auto_map
    elif hasattr(config, "auto_map"):
        del config.auto_map


def register() -> None:
    """Make transformers know `quant_method: corank`.

    Safe to call again, and takes over from the shipped fallback if a checkpoint has brought it in before.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    register_quantization_config(QUANT_METHOD)(CorankConfig)
    register_quantizer(QUANT_METHOD)(CorankQuantizer)


register()
