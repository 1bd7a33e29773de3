"""Files of a run in progress. Every file appears complete or not at all, so that a killed run can go on."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a whole safetensors file.

    Raises:
        CorankError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorankError(f"{path} is damaged ({error}); delete it and run the command again.") from None


class StatisticsStore:
    """Statistics per layer, on disk. One directory may serve several runs with the same model and data."""

    def __init__(self, root: Path):
        self.root = root

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
        return read_tensors(path) if path.is_file() else None

    def load(self, layer: int, stage: str, names: set[str]) -> Table:
        """Read a layer's statistics back."""
        states: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in read_tensors(self._path(layer, stage)).items():
            owner, name, leaf = key.split("|")
            if name in names:
                states.setdefault((owner, name), {})[leaf] = value
        table: Table = {}
        for (owner, name), state in states.items():
            table.setdefault(owner, {})[name] = STATISTICS[name].from_state(state)
        return table


class Activations:
    """The activation stream(s) at the latest finished block boundary, so that a killed run need not start over."""

    def __init__(self, root: Path | None, stage: str):
        self.root, self.stage = root, stage

    def _paths(self) -> list[tuple[int, Path]]:
        if self.root is None:
            return []
        found = self.root.glob(f"activations-{self.stage}-*.safetensors")
        return sorted((int(p.stem.rsplit("-", 1)[1]), p) for p in found)

    def save(self, layer: int, streams: list[list[Tensor]]) -> None:
        """Keep the activations in front of block `layer`, and forget earlier ones."""
        if self.root is None:
            return
        old = self._paths()
        tensors = {f"{s}|{i:05d}": h for s, stream in enumerate(streams) for i, h in enumerate(stream)}
        write_tensors(self.root / f"activations-{self.stage}-{layer:05d}.safetensors", tensors)
        for _, path in old:
            path.unlink(missing_ok=True)

    def load(self, up_to: int) -> tuple[int, list[list[Tensor]]] | None:
        """The latest boundary that is not behind block `up_to`, with its activations; None if there is none."""
        for layer, path in reversed(self._paths()):
            if layer <= up_to:
                tensors = read_tensors(path)
                count = 1 + max(int(key.split("|")[0]) for key in tensors)
                return layer, [[tensors[k] for k in sorted(tensors) if k.startswith(f"{s}|")] for s in range(count)]
        return None

    def clear(self) -> None:
        """Delete them; the stage is finished."""
        for _, path in self._paths():
            path.unlink(missing_ok=True)


def torch_dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")
