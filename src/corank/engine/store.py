"""Files of a run in progress. Every file appears complete or not at all, so that a killed run can go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from corank.engine.world import ALONE, World
from corank.errors import CorankError
from corank.statistics import STATISTICS, Statistic

Table = dict[str, dict[str, Statistic]]
"""Owner (a site, the leader of a group, or "block") -> name of the statistic -> statistic."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt", **(metadata or {})})
    os.replace(partial, path)


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, all or those whose names are wanted.

    Raises:
        CorankError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118
    except SafetensorError as error:
        raise CorankError(f"{path} is damaged ({error}); delete it and run the command again.") from None


class StatisticsStore:
    """Statistics per layer, on disk. One directory may serve several runs with the same model and data.

    Args:
        root: the directory.
        device: where what is read is needed.
    """

    def __init__(self, root: Path, device: torch.device | str = "cpu"):
        self.root, self.device = root, device

    def _path(self, layer: int, stage: str) -> Path:
        return self.root / f"{stage}-{layer:05d}.safetensors"

    def has(self, layer: int, stage: str, names: set[str]) -> bool:
        """Whether the layer's statistics of a stage ("inputs", "gradients") are there, all the `names`."""
        path = self._path(layer, stage)
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            return names <= {key.split("|")[1] for key in file.keys()}  # noqa: SIM118

    def save(self, layer: int, stage: str, table: Table) -> None:
        """Store a layer's statistics, beside those of other names that are there already."""
        tensors = read_tensors(self._path(layer, stage)) if self._path(layer, stage).is_file() else {}
        for owner, named in table.items():
            for name, statistic in named.items():
                tensors |= {f"{owner}|{name}|{key}": value for key, value in statistic.state().items()}
        write_tensors(self._path(layer, stage), tensors)

    def forget(self, layer: int, stage: str) -> None:
        """Delete a layer's statistics of a stage, if there are any."""
        self._path(layer, stage).unlink(missing_ok=True)

    def save_spectrum(self, layer: int, key: str, tensors: dict[str, Tensor]) -> None:
        """Store a decomposition of a matrix of a layer."""
        write_tensors(self.root / f"spectrum-{layer:05d}-{key}.safetensors", tensors)

    def load_spectrum(self, layer: int, key: str) -> dict[str, Tensor] | None:
        """Read a decomposition back, None if there is none."""
        path = self.root / f"spectrum-{layer:05d}-{key}.safetensors"
        return {k: v.to(self.device) for k, v in read_tensors(path).items()} if path.is_file() else None

    def load(self, layer: int, stage: str, names: set[str]) -> Table:
        """Read a layer's statistics back."""
        states: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in read_tensors(self._path(layer, stage)).items():
            owner, name, leaf = key.split("|")
            if name in names:
                states.setdefault((owner, name), {})[leaf] = value
        table: Table = {}
        for (owner, name), state in states.items():
            table.setdefault(owner, {})[name] = STATISTICS[name].from_state(state, self.device)
        return table


class Activations:
    """The activation stream(s) at the latest finished block boundary, so that a killed run need not start over.

    Every process keeps those of its batches, under the numbers these have among all; so a run may go on with more or
    fewer processes than it began with.

    Args:
        root: directory, None to keep nothing.
        stage: what the activations are of.
        world: the processes that keep theirs.
    """

    def __init__(self, root: Path | None, stage: str, world: World = ALONE):
        self.root, self.stage, self.world = root, stage, world

    def _paths(self) -> dict[int, list[Path]]:
        """Boundary -> files."""
        found: dict[int, list[Path]] = {}
        for path in sorted(self.root.glob(f"activations-{self.stage}-*.safetensors")) if self.root else []:
            found.setdefault(int(path.stem.split("-")[-2]), []).append(path)
        return found

    def save(self, layer: int, streams: list[list[Tensor]], numbers: range) -> None:
        """Keep the activations of the batches `numbers` in front of block `layer`. All processes are through after it."""
        if self.root is None:
            return
        tensors = {f"{s}|{i:05d}": h for s, stream in enumerate(streams) for i, h in zip(numbers, stream, strict=True)}
        name = f"activations-{self.stage}-{layer:05d}-{numbers.start:05d}.safetensors"
        write_tensors(self.root / name, tensors)
        self.world.wait()

    def forget(self, before: int) -> None:
        """Delete those in front of earlier blocks than `before`: everything up to there is finished and written."""
        if self.world.first:
            for path in (path for layer, paths in self._paths().items() if layer < before for path in paths):
                path.unlink(missing_ok=True)

    def load(self, up_to: int, numbers: range, total: int) -> tuple[int, list[list[Tensor]]] | None:
        """The latest boundary that is not behind block `up_to` and of which all batches are kept.

        Args:
            up_to: number of a block.
            numbers: batches that are wanted.
            total: batches that there are.

        Returns:
            (the boundary, the activations of every stream in the wanted batches); None if there is no such boundary.
        """
        layer = self.world.from_first(lambda: self._latest(up_to, total))
        if layer is None:
            return None
        tensors: dict[str, Tensor] = {}
        for path in self._paths()[layer]:
            tensors |= read_tensors(path, lambda key: int(key.split("|")[1]) in numbers)
        count = 1 + max(int(key.split("|")[0]) for key in tensors)
        return layer, [[tensors[f"{s}|{i:05d}"] for i in numbers] for s in range(count)]

    def _latest(self, up_to: int, total: int) -> int | None:
        for layer, paths in sorted(self._paths().items(), reverse=True):
            kept: set[int] = set()
            for path in paths:
                with safe_open(path, framework="pt") as file:
                    kept |= {int(key.split("|")[1]) for key in file.keys()}  # noqa: SIM118
            if layer <= up_to and len(kept) == total:
                return layer
        return None

    def clear(self) -> None:
        """Delete them; the stage is finished."""
        self.forget(1 << 62)


def torch_dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")
