"""The part of `config.json` that says which modules are factorized and how: `quantization_config`."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from corank.errors import CorankError

QUANT_METHOD = "corank"
FORMAT_VERSION = 1


class CorankConfig(QuantizationConfigMixin):
    """`quant_method: corank`. Every attribute is plain JSON.

    Args:
        modules: name of a module -> spec {"kind", "rank", "shape": [out, in], "bias", ...}.
        format_version: version of this layout; a newer one than this package knows is refused.
        recipe: the recipe that produced the factors.
        plan: the kind and rank chosen for every site.
        provenance: seed, hash of the calibration data, versions.
        fingerprint: name of a module -> Frobenius norm of its stored factors.
        files: name of a weight file -> its SHA-256.
        factor_quantization: how many matrices are stored as integers, {"library", "matrices": {"int8": 28, ...}};
            which they are is in `modules`, from which this is made.
        shape: widths of every block where they differ, {"blocks": [{"channels", "heads", "kv_heads", "head_dim", ...}, ...]};
            with "residual": [width, ...] those of all places of the residual stream, which then passes through maps; of a
            convolutional network {"blocks": [], "tensors": {name: shape}} in their place. The rest of config.json describes
            the model before it was narrowed.
        unknown: keys of later minor versions, ignored.

    Raises:
        CorankError: the checkpoint needs a newer corank.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        recipe: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        fingerprint: dict[str, float] | None = None,
        files: dict[str, str] | None = None,
        factor_quantization: dict[str, Any] | None = None,
        shape: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        quantized = count_quantized(modules or {})
        if format_version > FORMAT_VERSION or (factor_quantization is not None and quantized is None):
            raise CorankError(
                f"This checkpoint has corank format {format_version} and this package reads up to "
                f"{FORMAT_VERSION}; upgrade with `pip install -U corank`."
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.modules = modules or {}
        self.recipe = recipe
        self.plan = plan
        self.provenance = provenance
        self.fingerprint = fingerprint
        self.files = files
        self.factor_quantization = quantized
        self.shape = shape


def count_quantized(modules: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What `factor_quantization` says, from the specs of the modules; None if all factors are in floating point."""
    parts = [part for spec in modules.values() for part in spec.get("quantized", {}).values()]
    names = [f"int{part['bits']}" for part in parts]
    return {"library": "torchao", "matrices": {n: names.count(n) for n in sorted(set(names))}} if parts else None
