"""What each command does. Results go to standard output, progress to standard error."""

from corank.commands.arguments import DEFAULT_TEXTS, layers_of, parse_settings, read_texts
from corank.commands.compressing import compare, compress
from corank.commands.demonstration import demo
from corank.commands.handing_over import dequantize, export, quantize, serve, verify
from corank.commands.healing import heal
from corank.commands.measuring import bench, eval, generate
from corank.commands.output import console, emit
from corank.commands.pruning import prune
from corank.commands.showing import inspect, methods, plot

__all__ = [
    "DEFAULT_TEXTS",
    "bench",
    "compare",
    "compress",
    "console",
    "demo",
    "dequantize",
    "emit",
    "eval",
    "export",
    "generate",
    "heal",
    "inspect",
    "layers_of",
    "methods",
    "parse_settings",
    "plot",
    "prune",
    "quantize",
    "read_texts",
    "serve",
    "verify",
]
