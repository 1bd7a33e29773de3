"""Measuring models: perplexity under one protocol, speed, memory, samples, grids of methods and budgets."""

from corank.evaluate.bound import Bound, count_flops, measure_bound, weight_bytes
from corank.evaluate.compare import Cell, compare, grid
from corank.evaluate.generation import Sample, sample
from corank.evaluate.memory import PeakMemory
from corank.evaluate.perplexity import Perplexity, perplexity
from corank.evaluate.speed import SpeedRow, speed

__all__ = [
    "Bound",
    "Cell",
    "PeakMemory",
    "Perplexity",
    "Sample",
    "SpeedRow",
    "compare",
    "count_flops",
    "grid",
    "measure_bound",
    "perplexity",
    "sample",
    "speed",
    "weight_bytes",
]
