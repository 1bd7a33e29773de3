"""The two classes that vLLM sees. The only file that imports vLLM, so it is imported by `vllm_plugin.register` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from corank.checkpoint.config import QUANT_METHOD
from corank.errors import CorankError
from corank.serve.vllm import compute, weights
from corank.serve.vllm.specs import NameMapper, Spec, read_specs, rename, stored_names


class CorankQuantizationConfig(QuantizationConfig):
    """Decides, for every layer that vLLM builds, whether it holds factorized matrices.

    Args:
        specs: name in the checkpoint -> spec.

    Attributes:
        homes: name of a stored matrix -> (layer, part) that holds it, for those that share a basis.
    """

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        super().__init__()
        self.specs = dict(specs)
        self.homes: dict[str, tuple[nn.Module, weights.Part]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "homes": {}}  # sent to workers and copied; layers are not

    def get_name(self) -> str:
        """`corank`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The factors are ordinary floating-point matrices."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Volta, which vLLM itself needs."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CorankQuantizationConfig:
        """From the `quantization_config` of a checkpoint.

        Raises:
            CorankError: it cannot be served.
        """
        return cls(read_specs(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: NameMapper) -> None:
        """Follow a model that names its modules differently from the checkpoint."""
        self.specs = rename(self.specs, hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a linear layer; None for any other layer, which vLLM then leaves as it is.

        Raises:
            CorankError: the layer is not linear and yet factorized (the output embedding).
        """
        if not isinstance(layer, LinearBase):
            if prefix in self.specs:
                raise CorankError(
                    f"{prefix} is factorized, and the vLLM plug-in cannot serve a factorized {type(layer).__name__}; leave it "
                    "dense (ignore=...), or write a dense model with `corank dequantize`."
                )
            return None
        names = stored_names(prefix, self.packed_modules_mapping, self.specs)
        if not any(name in self.specs for name in names):
            return UnquantizedLinearMethod()
        return CorankLinearMethod([(name, self.specs.get(name)) for name in names], self.homes)


class CorankLinearMethod(LinearMethodBase):
    """Creates, loads and applies the matrices of one layer.

    Args:
        stored: (name in the checkpoint, spec or None if dense) in the order of the layer's outputs.
        homes: shared by all layers of a model, see `CorankQuantizationConfig`.
    """

    def __init__(
        self, stored: Sequence[tuple[str, Spec | None]], homes: dict[str, tuple[nn.Module, weights.Part]]
    ) -> None:
        self.stored, self.homes = stored, homes

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer its parameters, each with a loader of ours; vLLM's, in the extra attributes, is not used."""
        self.parts = weights.create(
            layer, self.stored, input_size_per_partition, output_partition_sizes, input_size, params_dtype
        )
        self.homes.update((part.name, (layer, part)) for part in self.parts.parts)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything has arrived, and find the bases that other layers hold.

        Raises:
            CorankError: a tensor is missing, or a basis is in no layer of this process.
        """
        weights.check_complete(layer, self.parts)
        for part in self.parts.parts:
            if part.kind == "shared":
                part.owner = weights.find_owner(part, self.parts, self.homes)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., out on this rank] from x [..., in on this rank]."""
        return compute.apply(layer, self.parts, x, bias)
