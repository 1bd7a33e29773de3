"""Writing a model with fewer or narrower blocks, block by block, without ever holding it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from corank.engine.directory import Lazy
from corank.engine.store import write_tensors
from corank.jsonfile import read_json, write_json
from corank.model import StreamedModel


def of_matrices(block: nn.Module) -> set[str]:
    """Names of the matrices in a block, experts and their routers included, and of their biases; norms are left out."""
    return {
        f"{path}.{leaf}"
        for path, module in block.named_modules()
        if any(p.dim() > 1 for p in module.parameters(recurse=False))
        for leaf, _ in module.named_parameters(recurse=False)
    }


class BlockFiles:
    """Narrowed blocks, each in a file of its own until the whole is assembled.

    Args:
        work: directory of the run.
        source: the model being streamed.
        dtype: of everything stored (the source's own).
    """

    def __init__(self, work: Path, source: StreamedModel, dtype: torch.dtype):
        self.folder, self.source, self.dtype = work / "blocks", source, dtype

    def _file(self, layer: int) -> Path:
        return self.folder / f"{layer:05d}.safetensors"

    def _note(self, layer: int) -> Path:
        return self.folder / f"{layer:05d}.json"

    def note(self, layer: int) -> dict[str, Any] | None:
        """What was said about a block that is finished, else None."""
        return read_json(self._note(layer)) if self._note(layer).is_file() else None

    def put(self, layer: int, block: nn.Module, note: Mapping[str, Any]) -> None:
        """Write a block under its number in the source; the note comes last and says that the block is complete."""
        write_tensors(self._file(layer), {k: self._stored(v) for k, v in block.state_dict().items()})
        write_json(self._note(layer), dict(note))

    def read(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a finished block, by their names inside it."""
        with safe_open(self._file(layer), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def tensors(
        self,
        kept: tuple[int, ...],
        mixes: Mapping[int, Mapping[int, float]],
        zeros: Mapping[str, tuple[int, ...]],
    ) -> Iterator[Lazy]:
        """Every tensor of the result, under the name it is to have.

        What has not been changed is copied under the names it was stored with, only with the new number of its block.

        Args:
            kept: numbers of the source's blocks that stay, in order.
            mixes: for a block, the share of each of those that are merged into it.
            zeros: biases to be written that the source has not.
        """
        source, plan = self.source, self.source.outline
        sizes = {name: tensor.numel() * self.dtype.itemsize for name, tensor in source.model.state_dict().items()}
        for key in self._stored_keys(name for name in source.keys if not plan.inside(name)):
            yield key, self._size(key), lambda key=key: self._stored(source.stored(key))  # type: ignore[misc]
        for new, old in enumerate(kept):
            before, after = f"{plan.path(old)}.", f"{plan.path(new)}."
            names = [name for name in source.keys if name.startswith(before)]
            if self._note(old).is_file():
                with safe_open(self._file(old), framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        size = torch.Size(file.get_slice(name).get_shape()).numel() * self.dtype.itemsize
                        yield after + name, size, lambda name=name, file=file: file.get_tensor(name)  # type: ignore[misc]
            elif old in mixes:
                for name in names:
                    inside = name.removeprefix(before)
                    yield after + inside, sizes[name], lambda name=name, mix=mixes[old]: self._mixed(name, mix)  # type: ignore[misc]
            else:
                for key in self._stored_keys(names):
                    yield (
                        self._renumbered(key, old, new),
                        self._size(key),
                        lambda key=key: self._stored(source.stored(key)),  # type: ignore[misc]
                    )
        for name, shape in zeros.items():
            size = torch.Size(shape).numel() * self.dtype.itemsize
            yield name, size, lambda shape=shape: torch.zeros(shape, dtype=self.dtype)  # type: ignore[misc]

    def _stored_keys(self, names: Any) -> list[str]:
        """Names in the files of everything that some tensors of the model are made from."""
        found = {id(stored): stored for stored in (self.source.keys[name] for name in names)}
        return [key for stored in found.values() for _, key in stored.parts]

    def _size(self, key: str) -> int:
        with safe_open(self.source.files[key], framework="pt") as file:
            return torch.Size(file.get_slice(key).get_shape()).numel() * self.dtype.itemsize

    def _renumbered(self, key: str, old: int, new: int) -> str:
        """A name in the files with another number of the block."""
        leaf = re.escape(self.source.outline.blocks.rpartition(".")[2])
        renamed, count = re.subn(rf"(^|\.){leaf}\.{old}\.", rf"\g<1>{leaf}.{new}.", key, count=1)
        if not count:  # stored under another word for the list of blocks
            renamed = re.sub(rf"(^|\.){old}\.", rf"\g<1>{new}.", key, count=1)
        return renamed

    def _mixed(self, name: str, mix: Mapping[int, float]) -> Tensor:
        """A tensor of a block into which others are merged: a mean of matrices, everything else as it is."""
        plan = self.source.outline
        number = next(i for i in mix if name.startswith(f"{plan.path(i)}."))
        inside = name.removeprefix(f"{plan.path(number)}.")
        if inside not in of_matrices(self.source.model.get_submodule(plan.path(number))):
            return self._stored(self.source.read(name))
        parts = ((share, self.source.read(f"{plan.path(i)}.{inside}")) for i, share in mix.items())
        return self._stored(sum(share * part.double() for share, part in parts))  # type: ignore[arg-type]

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", self.dtype if tensor.is_floating_point() else tensor.dtype)
