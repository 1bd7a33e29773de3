"""What is measured of a hidden vector: its mean and second moment, at the matrix that reads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corank.engine.stream import Observer
from corank.errors import CorankError
from corank.statistics import Cross, CrossGram, Gram, InputGram, InputMoments, NonFinite
from corank.structured.block import Block

FULL = ("leverage", "obs", "greedy")
"""Scores that look at how channels go together."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a vector z in R^n over T tokens.

    Attributes:
        second: float64 E[z z^T] [n, n], or its diagonal [n] if that is all that was measured.
        mean: float64 E[z] [n].
        count: T.
    """

    second: Tensor
    mean: Tensor
    count: int

    @property
    def full(self) -> bool:
        """Whether the whole second moment is known."""
        return self.second.ndim == 2

    @property
    def energy(self) -> Tensor:
        """E[z_j^2] [n]."""
        return self.second.diagonal() if self.full else self.second

    @property
    def variance(self) -> Tensor:
        """E[z_j^2] - E[z_j]^2 [n]; zero for a channel that is constant up to rounding."""
        variance = self.energy - self.mean.square()
        return torch.where(variance > 1e-12 * self.energy, variance, torch.zeros_like(variance))

    def centred(self) -> Moments:
        """Those of z - E[z]."""
        if not self.full:
            return Moments(self.variance, torch.zeros_like(self.mean), self.count)
        second = self.second - torch.outer(self.mean, self.mean)
        second.diagonal().copy_(self.variance)
        return Moments(second, torch.zeros_like(self.mean), self.count)


def moments(block: Block, paths: Iterable[str], full: bool) -> dict[str, Moments]:
    """Moments of the inputs of some matrices of a block, from one pass over its calibration data.

    Args:
        paths: of the matrices inside the block.
        full: measure whole second moments; else their diagonals.

    Raises:
        CorankError: inputs are not finite.
    """
    kind: type[InputGram] | type[InputMoments] = InputGram if full else InputMoments
    width = {block.path(s): s.shape[1] for s in block.sites}
    statistics = {path: kind(width[path]) for path in paths}
    block.observe({path: _observer(s, path, block.layer) for path, s in statistics.items()}, stop=True)
    found: dict[str, Moments] = {}
    for path, statistic in statistics.items():
        seen = statistic.result()
        second = seen.G if isinstance(seen, Gram) else seen.rms.square()
        found[path] = Moments(second, seen.mean, seen.count)
        _check_tokens(found[path])
    return found


def cross(block: Block, dense: nn.Module, path: str) -> tuple[Moments, Cross]:
    """Moments of the inputs that a matrix will really see, and their joint moments with those in the dense model.

    Args:
        block: as far as it has been narrowed.
        dense: the block as it was.
        path: of the matrix in both.
    """
    assert block.stream is not None and block.dense is not None, "an anchored recipe has both streams"
    statistic = CrossGram(next(s.shape[1] for s in block.sites if block.path(s) == path))
    seen: dict[str, Tensor] = {}
    for i in range(len(block.stream)):
        for name, stream, module in (("dense", block.dense, dense), ("drifted", block.stream, block.module)):

            def show(x: Tensor, mask: Tensor | None, name: str = name) -> None:
                seen[name] = x

            stream.observe(module, block.layer, i, {path: show}, stop=True)
        _observer(statistic, path, block.layer, seen["dense"])(seen["drifted"], block.stream.mask(i))
    joint = statistic.result()
    moments = Moments(joint.H, joint.drifted_mean, joint.count)
    _check_tokens(moments)
    return moments, joint


def _check_tokens(moments: Moments) -> None:
    if moments.full and moments.count < len(moments.mean):
        warnings.warn(
            f"There are {moments.count} tokens of calibration data for vectors of {len(moments.mean)} channels; second moments "
            "are singular then and are regularised. Give more data (--samples).",
            stacklevel=4,
        )


def _observer(
    statistic: InputGram | InputMoments | CrossGram, path: str, layer: int, beside: Tensor | None = None
) -> Observer:
    def observe(x: Tensor, mask: Tensor | None) -> None:
        try:
            if isinstance(statistic, CrossGram):
                assert beside is not None
                statistic.update(beside, x, mask)
            else:
                statistic.update(x, mask)
        except NonFinite as error:
            raise CorankError(f"The inputs of {path} in layer {layer} are not finite: {error}") from None

    return observe
