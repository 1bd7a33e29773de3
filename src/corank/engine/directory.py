"""Writing a compressed model block by block into a directory, without ever holding the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corank.checkpoint.verify import norm_of
from corank.engine.site import Replacement
from corank.engine.store import write_tensors
from corank.factors import FactorizedLinear
from corank.jsonfile import read_json, write_json
from corank.model import StreamedModel
from corank.model.names import catches, unconverted

SHARD_BYTES = 1 << 29
"""Tensors written at once. Small, because a shard has to be in memory while it is written."""

Lazy = tuple[str, int, Callable[[], Tensor]]
"""(name, bytes, read) of a tensor to be written."""


class DirectorySink:
    """Takes finished blocks and keeps each in a file of its own until the whole is assembled.

    Args:
        work: directory of the run.
        source: the model being streamed.
        dtype: dtype of the stored factors and of everything else (the source's own).
    """

    def __init__(self, work: Path, source: StreamedModel, dtype: torch.dtype):
        self.folder, self.source, self.dtype = work / "blocks", source, dtype

    def _file(self, layer: int) -> Path:
        return self.folder / f"{layer:05d}.safetensors"

    def _note(self, layer: int) -> Path:
        return self.folder / f"{layer:05d}.json"

    def done(self, layer: int) -> list[dict[str, Any]] | None:
        """Report rows of a block that is finished already, else None."""
        return read_json(self._note(layer))["rows"] if self._note(layer).is_file() else None

    def put(self, layer: int, block: nn.Module, replacements: list[Replacement], rows: list[dict[str, Any]]) -> None:
        """Write a block; the note is written last and says that the block is complete. Its memory is freed."""
        path = self.source.outline.path(layer)
        prefix = f"{path}." if path else ""
        tensors = {prefix + k: v for k, v in block.state_dict().items()}
        if not path:  # what lies around the blocks: of the model's state only that, and what is tied once
            mine = {f"{r.site.name}." for r in replacements}
            tensors = {k: v for k, v in tensors.items() if not self.source.outline.inside(k)}
            tensors = {k: v for k, v in tensors.items() if k in self.source.keys or k.startswith(tuple(mine))}
        write_tensors(self._file(layer), {k: self._stored(v) for k, v in tensors.items()})
        local = self.source.outline.local
        modules = {r.site.name: block.get_submodule(local(r.site)) for r in replacements}
        note = {
            "rows": rows,
            "modules": {r.site.name: r.module.spec() for r in replacements},
            "narrowed": [row["name"] for row in rows if "becomes" in row],
            "fingerprint": {
                name: norm_of(self._stored(t) for t in module.state_dict().values()) for name, module in modules.items()
            },
        }
        write_json(self._note(layer), note)
        if path:
            block.to("meta")

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", self.dtype if tensor.is_floating_point() else tensor.dtype)

    def notes(self) -> dict[str, dict[str, Any]]:
        """Specs ("modules") and "fingerprint" of all replaced modules."""
        merged: dict[str, dict[str, Any]] = {"modules": {}, "fingerprint": {}}
        for layer in self._layers():
            note = read_json(self._note(layer))
            for key, value in merged.items():
                value.update(note[key])
        return merged

    def _narrowed(self) -> list[str]:
        """Names of the matrices that have lost rows or columns."""
        return [name for layer in self._layers() for name in read_json(self._note(layer)).get("narrowed", ())]

    def _layers(self) -> list[int]:
        """Numbers of the blocks, and of what lies around them if that was visited."""
        layers = self.source.outline.layers
        return [*range(layers), *([layers] if self._note(layers).is_file() else [])]

    def _tensors(self) -> Iterator[Lazy]:
        """(name, bytes, read) of every tensor of the result."""
        around, source = self.source.outline.layers in self._layers(), self.source
        item = self.dtype.itemsize
        shapes = {n: t.numel() for n, t in source.model.state_dict().items()}
        kept = self._as_they_were()

        def stored(name: str, size: int) -> Iterator[Lazy]:
            for key in kept[name]:
                yield key, size // len(kept[name]), lambda key=key: self._stored(source.stored(key))  # type: ignore[misc]

        for name in source.keys:
            if not around and not source.outline.inside(name):
                if name in kept:
                    yield from stored(name, shapes[name] * item)
                else:
                    yield name, shapes[name] * item, lambda name=name: self._stored(source.read(name))  # type: ignore[misc]
        for layer in self._layers():
            with safe_open(self._file(layer), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    size = torch.Size(file.get_slice(name).get_shape()).numel() * item
                    if name in kept:
                        yield from stored(name, size)
                    else:
                        yield name, size, lambda name=name, file=file: file.get_tensor(name)  # type: ignore[misc]

    def _as_they_were(self) -> dict[str, list[str]]:
        """Tensors that are written as they were stored, where that is not how the model names them.

        None are if experts have been taken apart or a factor would be taken for something to be converted: then
        everything has the model's own names.
        """
        source, modules = self.source, self.notes()["modules"]
        changed = {f"{name}.{leaf}" for name in (*modules, *self._narrowed()) for leaf in ("weight", "bias")}
        untouched = [name for name in source.keys if name not in changed]
        kept = unconverted(source.keys, untouched)
        parts = (f"{name}.{part}" for name in modules for part in ("weight", "down.weight", "up.weight"))
        experts = any(site.pool is not None and site.name in modules for site in source.outline.sites)
        if experts or catches(source.model, parts):
            return {}
        return {name: keys for name, keys in kept.items() if keys != [name]}

    def assemble(self, target: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
        """Write the safetensors files of the result into `target`, and the index if there are several.

        Returns:
            their names.
        """
        return write_shards(self._tensors(), target, shard_bytes)


def write_shards(tensors: Iterable[Lazy], target: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write safetensors files into a directory, and the index if there are several.

    Args:
        tensors: (name, bytes, function that reads it), each read when it is written.
        target: the directory, made if need be.
        shard_bytes: size of a file; what is in one is in memory while it is written.

    Returns:
        their names.
    """
    target.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, int]] = []
    batch: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        save_file(batch, target / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in batch.items()})
        batch.clear()
        size = 0

    for name, bytes_, read in tensors:
        if batch and size + bytes_ > shard_bytes:
            flush()
        batch[name] = read().contiguous()
        size += bytes_
    flush()
    count = len(shards)
    names = [
        "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    for i, name in enumerate(names):
        (target / f"shard-{i}").rename(target / name)
        total += sum(shards[i].values())
    if count > 1:
        weight_map = {key: names[i] for i in range(count) for key in shards[i]}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)
    return names


def small_files(source: Path, suffixes: tuple[str, ...] = (".json", ".txt", ".jinja")) -> list[Path]:
    """The files that travel with weights: tokenizer or processor, generation settings, chat template."""

    def travels(file: Path) -> bool:
        skip = file.name in ("config.json", "report.json") or "safetensors" in file.name
        return file.is_file() and not skip and file.suffix in suffixes

    return [file for file in sorted(source.iterdir()) if travels(file)]


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files that travel with weights."""
    for file in small_files(source, (".json", ".txt", ".model", ".jinja")):
        shutil.copyfile(file, target / file.name)


class ElsewhereSink:
    """For a process whose blocks another one writes: their memory is freed.

    Args:
        source: the model being streamed.
    """

    def __init__(self, source: StreamedModel):
        self.source = source

    def done(self, layer: int) -> list[dict[str, Any]] | None:
        """It is not known here."""
        return None

    def put(self, layer: int, block: nn.Module, replacements: list[Replacement], rows: list[dict[str, Any]]) -> None:
        """Free the block."""
        if self.source.outline.path(layer):
            block.to("meta")


class MemorySink:
    """For a model that stays in memory: the blocks are in place already; their specs are collected."""

    def __init__(self) -> None:
        self.modules: dict[str, FactorizedLinear] = {}

    def done(self, layer: int) -> list[dict[str, Any]] | None:
        """Nothing is finished beforehand."""
        return None

    def put(self, layer: int, block: nn.Module, replacements: list[Replacement], rows: list[dict[str, Any]]) -> None:
        """Note the replaced layers."""
        self.modules |= {r.site.name: r.module for r in replacements}
