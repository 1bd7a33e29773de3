"""Proof that what was loaded is what was saved: digests of the files, norms of the factors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from corank.checkpoint.config import QUANT_METHOD, CorankConfig
from corank.checkpoint.integers import floating, plain
from corank.checkpoint.skeleton import empty_layer, factorized, resolve
from corank.errors import CorankError

INDEX = "model.safetensors.index.json"
CHUNK = 1 << 18  # values; fits the cache as fp64


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a model directory as a dict.

    Raises:
        CorankError: the path is not a model directory, or its config.json is not JSON.
    """
    root = Path(path)
    if not root.is_dir():
        raise CorankError(f"{root} is not a directory; give the folder of a model (download a hub model first).")
    if not (root / "config.json").is_file():
        raise CorankError(f"{root} is not a model directory: it has no config.json.")
    try:
        config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorankError(f"{root / 'config.json'} is not valid JSON ({error}); write the model again.") from error
    if not isinstance(config, dict):
        raise CorankError(f"{root / 'config.json'} is not a JSON object; write the model again.")
    return config


def corank_config(config: Mapping[str, Any]) -> CorankConfig | None:
    """The corank part of a config.json, or None for a model that is not compressed by corank.

    Raises:
        CorankError: it was written by a newer corank.
    """
    section = config.get("quantization_config") or {}
    return CorankConfig.from_dict(section) if section.get("quant_method") == QUANT_METHOD else None


def weight_files(path: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a model directory that its index names (or the single one there is).

    Returns:
        Paths in ascending order; empty when the directory has no safetensors weights at all.

    Raises:
        CorankError: the index is not readable or names a file that is missing.
    """
    root = Path(path)
    if (root / INDEX).is_file():
        try:
            names = set(json.loads((root / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CorankError(f"{root / INDEX} is corrupt; download or write the model again.") from error
    else:
        names = {"model.safetensors"} if (root / "model.safetensors").is_file() else set()
    for name in sorted(names):
        if not (root / name).is_file():
            raise CorankError(f"{root / name} is missing; download or write the model again.")
    return [root / name for name in sorted(names)]


def check_readable(files: Iterable[Path]) -> None:
    """Open every file and check that its header is consistent with its size.

    Raises:
        CorankError: a file is corrupt or truncated; names it.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                reader.keys()
        except (SafetensorError, OSError) as error:
            raise CorankError(
                f"{file} is corrupt or truncated ({error}); download or write the model again."
            ) from error


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests(files: Iterable[Path]) -> dict[str, str]:
    """File name -> SHA-256, hashing several files at a time."""
    files = list(files)
    with ThreadPoolExecutor() as pool:
        return {file.name: digest for file, digest in zip(files, pool.map(sha256, files), strict=True)}


def check_digests(root: Path, expected: Mapping[str, str]) -> None:
    """Compare the files under `root` with the digests written when they were saved.

    Raises:
        CorankError: a file is missing or has changed; names it.
    """
    for name in expected:
        if not (root / name).is_file():
            raise CorankError(f"{root / name} is missing; download or write the model again.")
    actual = digests(root / name for name in expected)
    for name, digest in expected.items():
        if actual[name] != digest:
            raise CorankError(
                f"{root / name} is not the file that was saved (its SHA-256 differs); download or write it again."
            )


def norm_of(tensors: Iterable[Tensor]) -> float:
    """sqrt of the sum of squares over the matrices among `tensors` (biases, indices and guards do not count).

    Accumulated in fp64, a chunk at a time.
    """
    total = 0.0
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dim() >= 2:
            for chunk in tensor.detach().reshape(-1).split(CHUNK):
                total += float(chunk.double().square().sum())
    return math.sqrt(total)


def fingerprint(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Frobenius norm of the stored factors of every factorized module.

    Modules that are not in memory (offloaded, sharded over processes) are left out.

    Args:
        model: with factorized modules.
        state: its `state_dict` where that is not to be taken from the model: gathered from several processes.
    """
    from torch.distributed.tensor import DTensor

    norms = {}
    for name, layer in factorized(model).items():
        own = layer.state_dict()
        if state is not None and all(f"{name}.{part}" in state for part in own):
            own = {part: state[f"{name}.{part}"] for part in own}
        tensors = floating(plain(own))
        if not any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in tensors):
            norms[name] = norm_of(tensors)
    return norms


def fingerprint_of_files(files: Iterable[Path], modules: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The same norms read from safetensors files, one module in memory at a time.

    Args:
        files: the weight files of one model.
        modules: name -> spec.

    Raises:
        CorankError: a tensor that a spec asks for is missing or has another shape.
    """
    where = {key: file for file in files for key in _keys(file)}
    norms = {}
    for name, spec in modules.items():
        tensors = {}
        for part, expected in empty_layer(spec, "meta", torch.float32).state_dict().items():
            key = f"{name}.{part}"
            if key not in where:
                raise CorankError(f"The weight files hold no {key}, which config.json asks for.")
            with safe_open(where[key], framework="pt") as reader:
                tensor = reader.get_tensor(key)
            if tensor.shape != expected.shape:
                shapes = f"{list(tensor.shape)} in {where[key].name} and {list(expected.shape)} in config.json"
                raise CorankError(f"{key} has shape {shapes}; they do not belong together.")
            tensors[part] = tensor
        norms[name] = norm_of(floating(tensors))
    return norms


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as reader:
        return list(reader.keys())


def tolerance(dtype: torch.dtype) -> float:
    """Relative change of a norm that casting to `dtype` can cause."""
    return max(torch.finfo(dtype).eps, 1e-6)


def check_fingerprint(model: nn.Module, expected: Mapping[str, float]) -> None:
    """Compare the factors in memory with the norms written when they were saved.

    Names are resolved like module names, and modules absent from the model or from memory are passed over.

    Raises:
        CorankError: names the first module whose factors are not those that were saved.
    """
    actual, layers = fingerprint(model), factorized(model)
    for name, saved in expected.items():
        found = resolve(model, name)
        if found is None or found not in actual:
            continue
        # Written so that NaN fails.
        if not abs(actual[found] - saved) <= tolerance(layers[found].weight.dtype) * max(saved, actual[found]):
            raise CorankError(
                f"{found}: the factors in memory (norm {actual[found]:.6g}) are not those that were saved "
                f"(norm {saved:.6g}); the weights are damaged, incomplete, or were changed since."
            )


def verify(target: str | os.PathLike[str] | nn.Module) -> None:
    """Check a directory, or a model in memory, against the digests and norms in its config.

    A directory is checked file by file (readable, SHA-256) and module by module (names, shapes, norms)
    without building the model. A dense directory is only checked to be readable.

    Args:
        target: a model directory, or a model whose config came from one.

    Raises:
        CorankError: names the file or the module that is not what was saved.
    """
    if isinstance(target, nn.Module):
        config = getattr(getattr(target, "config", None), "quantization_config", None)
        if isinstance(config, Mapping) and config.get("quant_method") == QUANT_METHOD:
            raise CorankError(
                "This model was loaded before corank was imported, so its factorized layers are random numbers; "
                "`pip install corank`, put `import corank` on the first line, and load it again."
            )
        if not isinstance(config, CorankConfig):
            raise CorankError("This model was not compressed by corank; there is nothing to verify it against.")
        if config.fingerprint is None:
            raise CorankError("This model has no fingerprint yet; save it first.")
        check_fingerprint(target, config.fingerprint)
        return
    root = Path(target)
    config, files = corank_config(read_config(root)), weight_files(root)
    check_readable(files)
    if config is None:
        return
    if not files:
        raise CorankError(f"{root} has no safetensors weights.")
    check_digests(root, config.files or {})
    actual = fingerprint_of_files(files, config.modules)
    for name, saved in (config.fingerprint or {}).items():
        if not math.isclose(actual.get(name, math.nan), saved, rel_tol=1e-6):
            raise CorankError(f"{name}: the stored factors are not those that config.json describes.")
