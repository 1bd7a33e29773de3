"""Back to a plain dense model."""

from __future__ import annotations

from typing import Any

from corank.checkpoint.quantizer import CorankQuantizer, drop_fallback
from corank.checkpoint.skeleton import restore_dense
from corank.checkpoint.widths import refuse_narrow, restore_widths


def dequantize(model: Any) -> Any:
    """Multiply the factors out and put stock layers back, in place.

    The result has nothing of corank in it: `save_pretrained` writes a checkpoint that any tool loads, as large as
    the original; blocks that have been narrowed get their old widths back, filled up with zeros. Sites that were
    given a bias which the architecture does not have keep it in memory; a stock loader would drop it, which is
    warned about.

    Args:
        model: a transformers model with factorized modules (one without is left as it is).

    Returns:
        The same object.

    Raises:
        CorankError: no plain configuration describes such a model (a residual stream or feature maps of other widths).
    """
    shape = getattr(getattr(model.config, "quantization_config", None), "shape", None)
    refuse_narrow(shape)
    restore_dense(model)
    restore_widths(model, shape)
    if getattr(model, "_weight_conversions", None) == []:
        del model._weight_conversions  # stored as the architecture is used to again
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, CorankQuantizer):
        quantizer.remove_quantization_config(model)
    drop_fallback(model.config)
    return model
