"""What all streaming statistics share: float64 sums, a count, and a merge that is addition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from corank.errors import CorankError


class Statistic:
    """A mean over calibration data, kept as a float64 sum and a count.

    Because everything kept is a sum, batches may come in any split, and partial statistics (of other batches,
    other processes) may be merged in any order: the result is the same up to float64 rounding.

    Subclasses declare their sums in ``axes`` and add ``update(...)`` and ``result()``.

    Args:
        sizes: the size of every axis named in ``axes``.
        device: where the sums live. None: where the first batch lives.

    Attributes:
        needs: what the model must supply, among "inputs", "gradients", "drifted", "hidden".
        axes: name of each sum -> names of its axes.
        count: tokens (or samples) seen.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    axes: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, sizes: Mapping[str, int], device: torch.device | str | None = None) -> None:
        self.count = 0
        self._sizes = dict(sizes)
        self._device = None if device is None else torch.device(device)
        self._sums: dict[str, Tensor] = {}

    def update(self, *tensors: Any, **options: Any) -> None:
        """Take in one batch; each statistic says which tensors."""
        raise NotImplementedError

    def result(self) -> Any:
        """The means so far, in float64; the statistic can go on being updated."""
        raise NotImplementedError

    def merge(self, other: Self) -> Self:
        """Add what ``other`` has seen to this statistic (in place) and return it.

        Raises:
            CorankError: if the two are of different classes or sizes.
        """
        if type(other) is not type(self) or other._sizes != self._sizes:
            raise CorankError(f"Cannot merge {other!r} into {self!r}; merge statistics of the same site.")
        with torch.inference_mode(False), torch.no_grad():
            for name, total in other._sums.items():
                self._add(name, total)
        self.count += other.count
        return self

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on later: the sums (float64; not copied) and ``count`` (int64)."""
        sums = {name: self._sums.get(name, self._zeros(name, None)) for name in self.axes}
        return {**sums, "count": torch.tensor(self.count, dtype=torch.int64)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], device: torch.device | str | None = None) -> Self:
        """Rebuild from ``state()``; the tensors are copied.

        Raises:
            CorankError: if a sum is missing or the shapes contradict each other.
        """
        missing = sorted({*cls.axes, "count"} - set(state))
        if missing:
            raise CorankError(f"The saved state of {cls.__name__} lacks {', '.join(missing)}; measure again.")
        sizes: dict[str, int] = {}
        for name, axes in cls.axes.items():
            shape = tuple(state[name].shape)
            if len(shape) == len(axes):
                for axis, size in zip(axes, shape, strict=True):
                    sizes.setdefault(axis, size)
            if shape != tuple(sizes.get(axis) for axis in axes):
                raise CorankError(
                    f"The saved state of {cls.__name__} has {name} of shape {shape}, which does not fit "
                    f"[{', '.join(axes)}]; measure again."
                )
        statistic = cls(**sizes, device=device)  # type: ignore[arg-type]
        for name in cls.axes:
            statistic._add(name, state[name])
        statistic.count = int(state["count"])
        return statistic

    def _zeros(self, name: str, near: torch.device | None) -> Tensor:
        shape = [self._sizes[axis] for axis in self.axes[name]]
        return torch.zeros(shape, dtype=torch.float64, device=self._device or near)

    def _add(self, name: str, value: Tensor) -> None:
        total = self._sums.get(name)
        if total is None:
            total = self._sums[name] = self._zeros(name, value.device)
        total += value.to(total.device)

    def _mean(self, name: str) -> Tensor:
        if self.count == 0:
            raise CorankError(f"{self!r} has seen no data; update it with at least one real token first.")
        return self._sums[name] / self.count

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={size}" for axis, size in self._sizes.items())
        return f"{type(self).__name__}({sizes})"
