"""The saved format: an ordinary Hugging Face directory whose config says which modules are factorized.

Importing this package registers `quant_method: corank` with transformers, after which `from_pretrained` and
`save_pretrained` work as for any model. `save` and `load` add atomic writing and verification.
"""

from __future__ import annotations

from corank.checkpoint.config import FORMAT_VERSION, CorankConfig
from corank.checkpoint.dequantize import dequantize
from corank.checkpoint.loading import load
from corank.checkpoint.quantized import quantize_factors
from corank.checkpoint.quantizer import CorankQuantizer, register
from corank.checkpoint.saving import attach, check_target, finish_directory, publish, save
from corank.checkpoint.skeleton import build, collect, factorized
from corank.checkpoint.verify import check_fingerprint, fingerprint, norm_of, verify

__all__ = [
    "FORMAT_VERSION",
    "CorankConfig",
    "CorankQuantizer",
    "attach",
    "build",
    "check_fingerprint",
    "check_target",
    "collect",
    "dequantize",
    "factorized",
    "finish_directory",
    "fingerprint",
    "load",
    "norm_of",
    "publish",
    "quantize_factors",
    "register",
    "save",
    "verify",
]
