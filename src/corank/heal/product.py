"""LoRA beside a factorized layer: y = W' x + s B A x with W' left in its stored form.

The layer class that `corank.heal.lora_config` registers with PEFT. Importing this module needs PEFT.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from corank.errors import CorankError
from corank.factors import FactorizedLinear, SharedLowRankLinear
from corank.heal.growth import grown, put_in_place

#: initialisations that look at nothing but the sizes; the others rewrite the weight, and here is none to rewrite
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


class LoraProduct(LoraLinear):
    """PEFT's LoRA layer around a factorized layer as a whole.

    Merging is exact: the adapter's matrices are appended to the factors and the rank grows (see
    `corank.heal.growth.grown`). The layer as it was is kept until the adapter is unloaded, so that unmerging is
    exact to the bit.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = False  # the factors of a Conv1D are stored as those of any linear layer
        self._before: tuple[nn.Module, ...] = ()  # in a tuple, so that it is not part of the model

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone."""
        return {(): None}

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        """No variant.

        Raises:
            CorankError: one is asked for.
        """
        try:
            super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise CorankError(
                f"This variant of LoRA needs the weight itself, and a factorized layer has none ({error}); put the "
                "adapters on the factors, or use plain LoRA."
            ) from None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            CorankError: its initialisation needs the weight itself.
        """
        if config.init_lora_weights not in INITIALISATIONS:
            raise CorankError(
                f"init_lora_weights={config.init_lora_weights!r} rewrites the weight, and a factorized layer has none; "
                "put the adapters on the factors, or use init_lora_weights=True."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def delta(self, adapter: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """(s B [out, r], A [r, in], s bias [out] or None) of one adapter, detached, in its own dtype."""
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        s = self.scaling[adapter]
        bias = None if B.bias is None else s * B.bias.detach()
        return s * B.weight.detach(), A.weight.detach(), bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Append the active adapters to the factors.

        Args:
            safe_merge: refuse adapters that hold NaN or infinite values.
            adapter_names: None means the active ones.

        Raises:
            CorankError: the layer shares its basis with others, or its factors are quantized.
            ValueError: `safe_merge` and an adapter is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            layer = cast(FactorizedLinear, self.base_layer)
            if isinstance(layer, SharedLowRankLinear) or getattr(layer, "followed", False):
                raise CorankError(
                    "Layers that share a basis are merged together; call corank.heal.merge_lora(model) "
                    "instead of merge_and_unload() or merge_adapter()."
                )
            parts = self.delta(name)
            if safe_merge and not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.settle(grown(layer, *parts))
            self.merged_adapters.append(name)

    def settle(self, layer: nn.Module) -> None:
        """Let `layer`, which computes the same or more, take the place of the wrapped one."""
        self._before = self._before or (self.base_layer,)
        self.base_layer = put_in_place(self.base_layer, layer).requires_grad_(False)

    def unmerge(self) -> None:
        """Put back the factors as they were before the first merge."""
        if self._before:
            weight: Any = self.base_layer.weight
            self.base_layer = self._before[0].to(weight.device, weight.dtype)
        self._before, self.merged_adapters = (), []

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.LoraProduct", "lora.Product", 1)
