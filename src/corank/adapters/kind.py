"""The kind of adapter "CORANK" for PEFT: its configuration, the model that injects it, its registration.

Importing this module needs PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from torch import nn

from corank.adapters.layer import CoreLayer
from corank.errors import CorankError
from corank.factors import FactorizedLinear, is_conv1d

NAME = "CORANK"


@dataclass
class CorankConfig(PeftConfig):
    """Configuration of an adapter that trains a small matrix inside fixed maps.

    Made by `corank.adapters.attach`, which also chooses the columns and rows; made by hand the first ones are taken.

    Attributes:
        method: name of the method, for people.
        form: "ends", "stack" or "rotation", see `corank.adaptation.Adaptation`.
        rank: of layers that `rank_pattern` does not name.
        rank_pattern: full name of a layer -> its rank.
        scale: factor before what is added.
        stacks: full names of the layers of each stack, in order.
        links: full names of the layers that are factorized.
        shapes: full name of a layer -> [out, in].
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, bias: as in other
            configurations of PEFT.
    """

    method: str = ""
    form: str = "ends"
    rank: int = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    scale: float = 1.0
    stacks: list[list[str]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, NAME)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]


class CorankModel(BaseTuner):
    """A model whose linear maps are wrapped in `CoreLayer`s."""

    prefix: str = "corank_"
    tuner_layer_cls = CoreLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(  # type: ignore[override]
        self,
        corank_config: CorankConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, CoreLayer):
            target.update_layer(adapter_name, corank_config, current_key)
            return
        factorized = isinstance(target, FactorizedLinear) and getattr(target, "form", None) is None
        if not (factorized or isinstance(target, nn.Linear) or is_conv1d(target)):
            raise CorankError(f"{current_key} is a {type(target).__name__}; these adapters go to linear layers.")
        layer = CoreLayer(target, adapter_name, corank_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in its place. A factorized one that is unloaded comes as it is: PEFT would assign its weight and bias."""
        if isinstance(new_module, FactorizedLinear):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the layers, and let those of a stack know each other."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]  # type: ignore[index]
        for names in config.stacks:
            try:
                members: tuple[Any, ...] = tuple(model.get_submodule(name) for name in names)
            except AttributeError as error:
                raise CorankError(f"The adapter does not fit this model: {error}.") from None
            for position, member in enumerate(members):
                member.corank_stacks[adapter_name] = (members, position)


def register_kind() -> None:
    """Make PEFT know the kind; once is enough, more does no harm.

    PEFT has no entry point for kinds that are not its own (huggingface/peft#2273): a name must be a member of
    its enumeration, so one is added.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    register_peft_method(name=NAME.lower(), config_cls=CorankConfig, model_cls=CorankModel, prefix=CorankModel.prefix)
