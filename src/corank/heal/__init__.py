"""Recovering what compression lost by training: distillation, block refinement, and adapters on factorized models."""

from __future__ import annotations

from corank.heal.healing import Healed, train
from corank.heal.lora import load_lora, lora_config, merge_lora
from corank.heal.parameters import WHAT
from corank.heal.training import Schedule
from corank.heal.way import Way, list_ways

__all__ = ["WHAT", "Healed", "Schedule", "Way", "list_ways", "load_lora", "lora_config", "merge_lora", "train"]
