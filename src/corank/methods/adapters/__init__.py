"""Adapters for fine-tuning: one file per published method."""
