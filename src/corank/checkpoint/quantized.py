"""Quantizing the factors of a compressed model: two compressions in one checkpoint."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corank.checkpoint.config import CorankConfig
from corank.checkpoint.integers import StoredLinear, as_linear, quantize, specs_of
from corank.checkpoint.saving import (
    MARKER,
    attach,
    check_target,
    finish_directory,
    publish,
    save,
)
from corank.checkpoint.skeleton import collect, factorized
from corank.checkpoint.verify import INDEX, check_digests, corank_config, read_config, weight_files
from corank.errors import CorankError, unknown
from corank.jsonfile import read_json, write_json

SCHEMES = {"int8": 8, "int4": 4}
PARTS = ("down", "up")
"""What is quantized. The link of a CUR is not: it is small and ill-conditioned."""
STALE = ("config.json", "report.json", "report.html", "README.md", "modeling_corank.py")
"""Files that say things about the weights; they are written anew or left out."""


@dataclass(frozen=True)
class Account:
    """What quantizing the factors did, in numbers.

    Attributes:
        matrices: "int8", "int4", "float" -> how many of the matrices `down` and `up` are now stored so.
        values: the same, of their entries.
        before, after: bytes of these matrices, scales included.
    """

    matrices: dict[str, int]
    values: dict[str, int]
    before: int
    after: int

    @property
    def bits(self) -> float:
        """Stored bits per entry, scales included."""
        return 8 * self.after / max(sum(self.values.values()), 1)


def quantize_factors(
    source: nn.Module | str | os.PathLike[str],
    scheme: str = "int8",
    *,
    out: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    group: int = 32,
) -> Account:
    """Store the factors `down` and `up` of every factorized module as integers, by torchao, weight-only.

    Dense sites, embeddings and a head whose factors the embedding reads, convolutions, norms, biases and the link of a
    CUR stay as they are, and so does a factor that would not become smaller (a handful of columns). Loading the result
    needs torchao; it multiplies in floating point, so it saves bytes rather than time. It takes adapters, but its
    factors no longer train.

    Args:
        source: a directory made by corank, which is worked on file by file without building the model; or a model in
            memory, which is changed in place.
        scheme: "int8", one scale a row; "int4", one scale for every `group` values of a row, where the row consists of
            whole groups (a factor where it does not gets int8). Four bits are four bits on disk alone: in memory
            torchao holds each in a byte.
        out: directory to write. Required for a directory; for a model None writes nothing.
        tokenizer: to save with a model in memory.
        group: an even number, for int4.

    Returns:
        The account, which is also in ``out/report.json`` if the source had a report. A report.html or model card of
        the source is not copied: it speaks of other files.

    Raises:
        CorankError: torchao is missing, an unknown scheme, a model without factors or with quantized ones, a target
            that exists, damaged files. Nothing is written then, and no model is changed.
    """
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    if group < 2 or group % 2:
        raise CorankError(f"A group must be an even number of values, got {group}.")
    tally = _Tally(SCHEMES[scheme], group)
    if isinstance(source, nn.Module):
        target = None if out is None else check_target(out)
        _in_memory(source, tally)
        if target is not None:
            save(source, tokenizer, target)
    elif out is None:
        raise CorankError("Give out=DIRECTORY: a model that is read from disk is written to disk.")
    else:
        _directory(Path(source), check_target(out), tally)
    return tally.account()


def _places(modules: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of the factorized linear layers whose factors are quantized."""
    looked_up = {spec["owner"] for spec in modules.values() if spec.get("form") == "tied"}
    plain = {name for name, spec in modules.items() if spec["kind"] != "dense" and spec.get("form") is None}
    return plain - looked_up


class _Tally:
    """Quantizes one matrix after the other and keeps count."""

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group = bits, group
        self.rows: list[tuple[str, int, int, int]] = []  # stored as, entries, bytes before, bytes after

    def take(self, weight: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Quantize a matrix [m, n]; None where it stays."""
        found = quantize(weight, self.bits, self.group)
        name = "float" if found is None else f"int{found[0]['bits']}"
        after = weight.nbytes if found is None else sum(tensor.nbytes for tensor in found[1].values())
        self.rows.append((name, weight.numel(), weight.nbytes, after))
        return found

    def account(self) -> Account:
        names = sorted({row[0] for row in self.rows})
        return Account(
            {name: sum(row[0] == name for row in self.rows) for name in names},
            {name: sum(row[1] for row in self.rows if row[0] == name) for name in names},
            sum(row[2] for row in self.rows),
            sum(row[3] for row in self.rows),
        )


def _in_memory(model: Any, tally: _Tally) -> None:
    layers = factorized(model)
    _check(bool(layers), any(specs_of(layer) for layer in layers.values()), "This model")
    if any(hasattr(part, "base_layer") for layer in layers.values() for part in layer.children()):
        raise CorankError("The factors carry adapters; merge them first with `model = model.merge_and_unload()`.")
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for layer in (layers[name] for name in sorted(_places(collect(model)))):
        for part, old in layer.named_children():
            found = tally.take(old.weight.detach()) if part in PARTS else None  # type: ignore[union-attr, operator]
            if found is not None:
                replaced.append((layer, part, _quantized(old, *found)))
    for place, part, new in replaced:  # at the end, so that a failure leaves the model as it was
        setattr(place, part, new)
    before = getattr(model.config, "quantization_config", None)
    attach(model, provenance=_provenance(before if isinstance(before, CorankConfig) else None))
    model.is_quantized = True


def _provenance(section: CorankConfig | None) -> dict[str, Any]:
    """What is known of the source, and by what its factors were rounded."""
    known = (section.provenance if section is not None else None) or {}
    versions = {**(known.get("versions") or {}), "torchao": importlib.metadata.version("torchao")}
    return {**known, "versions": versions}


def _quantized(old: Any, spec: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Linear:
    """The layer that a loader would build from these tensors."""
    shape = old.out_features, old.in_features
    stored = StoredLinear(shape, spec, False, "meta", old.weight.dtype).train(old.training)
    for name, tensor in tensors.items():
        setattr(stored, name, tensor)
    stored.bias = old.bias
    return as_linear(stored)


def _directory(source: Path, target: Path, tally: _Tally) -> None:
    content = read_config(source)
    section, files = corank_config(content), weight_files(source)
    _check(section is not None and bool(section.modules), bool(section and section.factor_quantization), str(source))
    assert section is not None
    check_digests(source, section.files or {})
    modules = {name: dict(spec) for name, spec in section.modules.items()}
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists() and not (partial / MARKER).exists():
        raise CorankError(f"{partial} is left from an unfinished run; resume that run or remove the directory.")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / MARKER).touch()
        for file in files:
            save_file(_shard(file, modules, tally), partial / file.name, metadata={"format": "pt"})
        for file in source.iterdir():
            if file.is_file() and file.name not in STALE and file.name != INDEX and file.suffix != ".safetensors":
                shutil.copyfile(file, partial / file.name)
        finish_directory(
            partial,
            content,
            modules,
            [file.name for file in files],
            recipe=section.recipe,
            plan=section.plan,
            provenance=_provenance(section),
        )
        if (source / "report.json").is_file():
            report = _report(read_json(source / "report.json"), modules, tally.account(), _bytes(partial))
            write_json(partial / "report.json", report)
        (partial / MARKER).unlink()
        publish(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CorankError(f"Could not write {target}: {error}. Nothing has been kept.") from error
        raise


def _shard(file: Path, modules: dict[str, dict[str, Any]], tally: _Tally) -> dict[str, Tensor]:
    """The tensors of one file, factors quantized; what was done is noted in `modules`."""
    tensors: dict[str, Tensor] = {}
    places = _places(modules)
    with safe_open(file, framework="pt") as reader:
        for key in reader.keys():  # noqa: SIM118
            tensor = reader.get_tensor(key)
            module, _, part = key.removesuffix(".weight").rpartition(".")
            wanted = key.endswith(".weight") and part in PARTS and module in places
            found = tally.take(tensor) if wanted else None
            if found is None:
                tensors[key] = tensor
                continue
            modules[module].setdefault("quantized", {})[part] = found[0]
            tensors.update({f"{module}.{part}.{name}": value for name, value in found[1].items()})
    return tensors


def _report(report: dict[str, Any], modules: dict[str, dict[str, Any]], account: Account, size: int) -> dict[str, Any]:
    """The report of the source with the new sizes, and with 8 bits called 8 bits."""
    accounting = dict(report.get("accounting") or {})
    if isinstance(accounting.get("bytes"), dict):
        accounting["bytes"] = {**accounting["bytes"], "compressed": size}
    accounting["factors"] = {
        "matrices": account.matrices,
        "values": account.values,
        "bytes": {"before": account.before, "after": account.after},
        "bits": account.bits,
    }
    sites = [
        {**site, "bits": {part: spec["bits"] for part, spec in quantized.items()}}
        if (quantized := modules.get(site["name"], {}).get("quantized"))
        else site
        for site in report.get("sites") or []
    ]
    stored = ", ".join(f"{count} as {name}" for name, count in account.matrices.items())
    warning = (
        f"The factors are quantized ({stored}; {account.bits:.2f} bits a value with the scales): parameters are counted "
        "as values, bytes as they are. What was evaluated before, was evaluated without this."
    )
    return {**report, "accounting": accounting, "sites": sites, "warnings": [*(report.get("warnings") or []), warning]}


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _check(factors: bool, quantized: bool, what: str) -> None:
    if not factors:
        raise CorankError(f"{what} has no factors; compress it with corank first.")
    if quantized:
        raise CorankError(f"{what} has quantized factors already; start from the one in floating point.")
