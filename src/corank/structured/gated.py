"""Gates on the units of a model: where they are, and what they mean for the weights.

A unit u of a hidden vector z (`corank.structured.units`) has a gate g_u: its consumer reads g_u z_u. A dimension j of the
residual stream has a gate g_j as well: whatever writes to it writes g_j times that. A gate of 0 is a unit that is not
there, a gate of 1 changes nothing, and any other value is the same as weights multiplied by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corank.factors import is_conv1d
from corank.gates import Point, Vector
from corank.model.outline import Outline
from corank.structured.units import Units

HIDDEN = "hidden"
"""Name of the gates of the dimensions of the residual stream."""
WRITERS = ("o", "down")
"""Roles of the matrices of a block that write to the residual stream."""


def unit_place(units: Units, each: int = 0) -> Vector:
    """Gates on the units of a hidden vector: at the input of the matrix that reads it.

    Args:
        units: of the vector.
        each: parameters that go with a unit.
    """
    return Vector(units.name, (Point(units.name),), units.count, units.size, each)


def hidden_place(model: Any, outline: Outline) -> Vector:
    """Gates on the dimensions of the residual stream: behind the embedding and all matrices that write to it."""
    embedding = model.get_input_embeddings()
    first = next(name for name, module in model.named_modules() if module is embedding)
    written = [s.name for s in outline.sites if s.role in WRITERS]
    width = model.config.get_text_config().hidden_size
    return Vector(HIDDEN, tuple(Point(path, "output") for path in (first, *written)), width)


@torch.no_grad()
def fold_units(model: nn.Module, units: Sequence[Units], values: Mapping[str, Tensor]) -> None:
    """Multiply the columns of consumers by the gates of what they read, in place.

    Args:
        model: whose consumers are plain linear layers.
        units: that may have gates.
        values: name of the units -> gates [count]; those without an entry have none.
    """
    for each in units:
        if each.name not in values or bool((values[each.name] == 1).all()):
            continue
        layer: Any = model.get_submodule(each.name)
        gate = values[each.name].to(layer.weight.device).double().repeat_interleave(each.size)
        layer.weight.copy_(layer.weight.double() * (gate[:, None] if is_conv1d(layer) else gate))
