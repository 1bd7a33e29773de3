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
        factor_quantization: reserved; must be None in this version.
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
        **unknown: Any,
    ) -> None:
        if format_version > FORMAT_VERSION or factor_quantization is not None:
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
        self.factor_quantization = factor_quantization
