"""Recovering what compression lost by training: adapters on factorized models."""

from __future__ import annotations

from corank.heal.lora import load_lora, lora_config, merge_lora

__all__ = ["load_lora", "lora_config", "merge_lora"]
