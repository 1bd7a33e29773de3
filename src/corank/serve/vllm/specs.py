"""What config.json says about the factorized matrices, and the way from vLLM's names of layers to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from corank.checkpoint.config import CorankConfig
from corank.errors import CorankError

KINDS = ("dense", "low_rank", "cur", "row_pivoted", "column_pivoted", "shared")
"""Kinds of factors that can be served."""

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""Used where a model does not say itself what it fuses; these names mean the same everywhere."""


class NameMapper(Protocol):
    """vLLM's `WeightsMapper`: from the names in a checkpoint to the names in vLLM's model."""

    def apply_list(self, values: list[str]) -> list[str]:
        """The new names; a name that the model has no use for is left out."""


@dataclass(frozen=True)
class Spec:
    """One stored matrix.

    Attributes:
        name: of the module that held it.
        kind: one of `KINDS`.
        rank: number of columns of B in W' = B A.
        shape: (out, in) of the whole matrix.
        bias: whether a bias is stored with it.
        basis: kind shared: the name of the module that stores A.
    """

    name: str
    kind: str
    rank: int
    shape: tuple[int, int]
    bias: bool
    basis: str | None = None


def read_specs(section: Mapping[str, Any]) -> dict[str, Spec]:
    """Name -> spec from the `quantization_config` of a checkpoint.

    Raises:
        CorankError: the format is newer than this package, or a matrix cannot be served.
    """
    dense = "or write a dense model with `corank dequantize`."
    specs = {}
    config = CorankConfig(**section)
    if config.shape is not None:
        raise CorankError(
            "The blocks of this model have widths of their own, which vLLM's model classes cannot be given; serve it by "
            "`corank serve`, compress the dense model with families=factorize or uniform=true, " + dense
        )
    for name, entry in config.modules.items():
        kind = entry.get("kind")
        if kind not in KINDS:
            raise CorankError(
                f"{name}: the vLLM plug-in serves the kinds {', '.join(KINDS)}, not {kind!r}; upgrade with "
                f"`pip install -U corank`, {dense}"
            )
        if entry.get("quantized"):
            raise CorankError(
                f"{name}: its factors are quantized, which the vLLM plug-in cannot serve; leave that out, {dense}"
            )
        if entry.get("form") or ".experts." in name:
            what = "experts" if ".experts." in name else f"layers of the form {entry['form']!r}"
            raise CorankError(
                f"{name} is factorized, and the vLLM plug-in cannot serve factorized {what}; leave them dense (ignore=...), {dense}"
            )
        try:
            (m, n), rank = entry["shape"], entry["rank"]
        except (KeyError, TypeError, ValueError) as error:
            raise CorankError(
                f"{name}: its entry in config.json has no shape or rank; write the model again."
            ) from error
        specs[name] = Spec(name, kind, int(rank), (int(m), int(n)), bool(entry.get("bias")), entry.get("basis"))
        if kind == "shared" and specs[name].basis is None:
            raise CorankError(f"{name}: its entry in config.json names no basis; write the model again.")
    return specs


def rename(specs: Mapping[str, Spec], mapper: NameMapper) -> dict[str, Spec]:
    """The specs under the names that vLLM's model uses; modules that it does not have are left out."""

    def new(name: str) -> str | None:
        # rules are written for names of tensors and may end in a dot, so the name of a module needs a tail to match them
        for tail in (".weight", ""):
            found = mapper.apply_list([name + tail])
            if not found:
                return None
            if found[0].endswith(tail):
                return found[0].removesuffix(tail)
        return None

    renamed = {}
    for spec in specs.values():
        name = new(spec.name)
        if name is not None:
            basis = None if spec.basis is None else new(spec.basis) or spec.basis
            renamed[name] = dataclasses.replace(spec, name=name, basis=basis)
    return renamed


def stored_names(prefix: str, packed: Mapping[str, Sequence[str]], specs: Mapping[str, Spec]) -> list[str]:
    """Names in the checkpoint of the matrices that vLLM keeps in one layer.

    Args:
        prefix: vLLM's name of the layer.
        packed: the model's `packed_modules_mapping`: fused leaf name -> the leaf names it is made of.
        specs: the factorized matrices; one stored under the fused name itself (Phi-3) is not taken apart.

    Returns:
        one name per stored matrix, in the order of the layer's outputs.
    """
    parent, dot, leaf = prefix.rpartition(".")
    parts = packed.get(leaf) or FUSED.get(leaf)
    if prefix in specs or not parts:
        return [prefix]
    return [parent + dot + part for part in parts]
