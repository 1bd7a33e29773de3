"""From the names in a checkpoint's files to the names in the model, with what has to be done on the way.

Checkpoints on the hub do not always store what transformers computes with: names have changed, and experts are stored
one by one and stacked on loading. transformers keeps the list of these conversions; here it is applied to one tensor
at a time, so that a block can be read without the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Stored:
    """Where a tensor of the model is stored.

    Attributes:
        first: the name that the conversion yields first (its own, unless one stored tensor is split into several).
        parts: (pattern, name in the files) of everything it is made from.
        conversion: transformers' conversion, None if the stored tensor is the tensor.
    """

    first: str
    parts: list[tuple[str, str]] = field(default_factory=list)
    conversion: Any = None

    def read(self, name: str, get: Callable[[str], Tensor], model: PreTrainedModel) -> Tensor:
        """The tensor.

        Args:
            name: the model's name for it.
            get: gives a stored tensor by its name in the files.
            model: whose configuration some conversions look at.
        """
        if self.conversion is None:
            return get(self.parts[0][1])
        conversion = copy.deepcopy(self.conversion)
        for pattern, key in self.parts:
            conversion.add_tensor(self.first, key, pattern, get(key))
        made = conversion.convert(self.first, model=model, config=model.config)[name]
        return made[0] if isinstance(made, list) else made


def unconverted(found: Mapping[str, Stored], untouched: Iterable[str]) -> dict[str, list[str]]:
    """Under which names tensors that have not been changed can be written as they were stored.

    Args:
        found: as `match` gives it.
        untouched: the model's names of unchanged tensors.

    Returns:
        the model's name -> names in the files; what several tensors of the model are made from is under the first of
        them, and left out if one of them has been changed.
    """
    kept = set(untouched)
    made: dict[int, list[str]] = {}
    for name, stored in found.items():
        made.setdefault(id(stored), []).append(name)
    whole = [names for names in made.values() if kept.issuperset(names)]
    return {
        name: [key for _, key in found[name].parts] if name == names[0] else [] for names in whole for name in names
    }


def catches(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether saving a model under the names it was stored with would rename or convert any of `names`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

    known = getattr(model, "_weight_conversions", None)
    if known is None:
        known = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    back = [conversion.reverse_transform() for conversion in known[::-1]]
    renamings = [c for c in back if isinstance(c, WeightRenaming)]
    converters = [c for c in back if isinstance(c, WeightConverter)]
    return any(rename_source_key(name, renamings, converters, reverse=True) != (name, None) for name in names)


def match(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Stored]:
    """Find the tensors of a model among those of its checkpoint.

    Args:
        model: on the meta device.
        keys: names in the files.

    Returns:
        the model's name -> where it is stored; names that are not in the files are missing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted, base = model.state_dict(), model.base_model_prefix
    found: dict[str, Stored] = {}
    for key in sorted(keys, key=dot_natural_key):  # experts in the order of their numbers
        name, pattern = rename_source_key(key, renamings, converters, base, wanted)
        if name not in wanted:  # a name of the model may look like one to be converted
            name, pattern = rename_source_key(key, [], [], base, wanted)
        if name not in wanted:
            continue
        if pattern is None:
            found[name] = Stored(name, [("", key)])
            continue
        conversion = by_pattern[pattern]
        stored = found.setdefault(name, Stored(name, conversion=conversion))
        stored.parts.append((pattern, key))
        for other in conversion.target_patterns[1:]:  # one stored tensor, several of the model
            found[name.replace(conversion.target_patterns[0], other)] = stored
    return {name: stored for name, stored in found.items() if name in wanted}
