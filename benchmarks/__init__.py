"""Measurements. Every one is a command, prints a table, and writes JSON with the hardware's name."""
