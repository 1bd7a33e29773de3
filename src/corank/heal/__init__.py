"""Recovering what compression lost by training: distillation, block refinement, and adapters on factorized models."""

from __future__ import annotations

from corank.heal.healing import HOW, Healed, train
from corank.heal.lora import load_lora, lora_config, merge_lora
from corank.heal.training import Schedule

__all__ = ["HOW", "Healed", "Schedule", "load_lora", "lora_config", "merge_lora", "train"]
