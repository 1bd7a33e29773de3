"""How long a model should take: a model of time from launches, bytes and operations, and the figures of a device."""

from corank.timing.anatomy import Anatomy, anatomy, stored_dtype
from corank.timing.break_even import break_even_rank, break_even_size
from corank.timing.clock import Clock
from corank.timing.device import PRESETS, Device, find_device, measure_device, this_device
from corank.timing.kernels import Kernel, matrix_seconds
from corank.timing.prediction import MODES, PAYS, Prediction, predict
from corank.timing.processor import drawback, instructions
from corank.timing.rates import Bound, measure_bound, synchronize
from corank.timing.runtimes import RUNTIMES, Runtime

__all__ = [
    "MODES",
    "PAYS",
    "PRESETS",
    "RUNTIMES",
    "Anatomy",
    "Bound",
    "Clock",
    "Device",
    "Kernel",
    "Prediction",
    "Runtime",
    "anatomy",
    "break_even_rank",
    "break_even_size",
    "drawback",
    "find_device",
    "instructions",
    "matrix_seconds",
    "measure_bound",
    "measure_device",
    "predict",
    "stored_dtype",
    "synchronize",
    "this_device",
]
