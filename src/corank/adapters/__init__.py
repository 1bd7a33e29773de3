"""Adapters for fine-tuning that keep the shape of what they adapt, as kinds of PEFT adapters.

    import corank.adapters

    adapted = corank.adapters.attach(model, "curing", rank=64, targets=["q", "k", "gate"])
    ...                                            # train it like any PEFT model
    corank.adapters.save(adapted, "adapter")       # adapted.save_pretrained("adapter") for all but pissa and corda
    model = PeftModel.from_pretrained(model, "adapter").merge_and_unload()

Importing this package registers the kind "CORANK" with PEFT, if PEFT is installed.
"""

from __future__ import annotations

import importlib.util

from corank.adaptation import Adaptation, adapter, adapters
from corank.adapters.attaching import attach, trainable
from corank.adapters.saving import load, save
from corank.adapters.targets import linear_maps

if importlib.util.find_spec("peft") is not None:
    from corank.adapters.kind import register_kind

    register_kind()

__all__ = ["Adaptation", "adapter", "adapters", "attach", "linear_maps", "load", "save", "trainable"]
