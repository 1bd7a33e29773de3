"""The door for vLLM: what the entry point `vllm.general_plugins` names.

vLLM calls `register` in each of its processes before it looks at a model. From then on a directory written by corank
is recognised by the `quant_method` in its config.json, and `vllm serve DIRECTORY` needs no flag.
"""

from __future__ import annotations

from corank.checkpoint.config import QUANT_METHOD
from corank.errors import CorankError


def register() -> None:
    """Make vLLM know `quant_method: corank`. Safe to call any number of times.

    Raises:
        CorankError: vLLM is not installed.
    """
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    except ImportError as error:
        raise CorankError(f"Serving with vLLM needs vLLM ({error}); install it with `pip install vllm`.") from error
    if QUANT_METHOD in QUANTIZATION_METHODS:  # some versions refuse a second registration, others warn
        return
    from corank.serve.vllm.config import CorankQuantizationConfig

    register_quantization_config(QUANT_METHOD)(CorankQuantizationConfig)
