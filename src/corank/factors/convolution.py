"""Convolutions in two: a kernel is the matrix W: [out, in * height * width], applied to the patches of an image."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corank.factors.base import FactorizedLinear
from corank.factors.low_rank import LowRank


def geometry_of(conv: Any) -> dict[str, list[int]]:
    """How a 2-D convolution looks at its input, as JSON."""
    return {name: list(getattr(conv, name)) for name in ("kernel_size", "stride", "padding", "dilation")}


def patches(conv: Any, x: Tensor) -> Tensor:
    """What the matrix of a convolution is applied to: images [B, C, H, W] -> [B, positions, C * height * width]."""
    return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT


def convolution(weight: Tensor, bias: Tensor | None, geometry: dict[str, list[int]]) -> nn.Conv2d:
    """An nn.Conv2d with a copy of `weight` [out, in, height, width], never initialised."""
    conv: Any = nn.Conv2d(1, 1, 1, bias=False, device="meta")
    conv.out_channels, conv.in_channels = weight.shape[:2]
    for name, value in geometry.items():
        setattr(conv, name, tuple(value))
    conv._reversed_padding_repeated_twice = [p for p in reversed(conv.padding) for _ in range(2)]
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True))
    return conv


ONE_BY_ONE = {"kernel_size": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}


class FactorizedConv2d(FactorizedLinear):
    """Two convolutions: `down` has the kernel, stride and padding of the original and k channels, `up` is 1 x 1.

    Attributes:
        geometry: kernel size, stride, padding and dilation.
    """

    kind: ClassVar[str] = "low_rank"
    form: ClassVar[str] = "conv"

    def __init__(self, B: Tensor, A: Tensor, geometry: dict[str, list[int]], bias: Tensor | None = None) -> None:
        super().__init__((B.shape[0], A.shape[1]), B.shape[1], like=B)
        self.geometry = geometry
        height, width = geometry["kernel_size"]
        channels = A.shape[1] // (height * width)
        self.down = convolution(A.reshape(A.shape[0], channels, height, width), None, geometry)
        self.up = convolution(B.reshape(*B.shape, 1, 1), bias, ONE_BY_ONE)

    @classmethod
    def replacing(cls, old: nn.Module, factors: LowRank, bias: Tensor | None) -> Self:
        """The layer for the factors of a convolution."""
        return cls(factors.B, factors.A, geometry_of(old), bias)

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        (m, n), k = spec["shape"], spec["rank"]
        B = torch.empty(m, k, device=device, dtype=dtype)
        return cls(B, B.new_empty(k, n), spec["geometry"], B.new_empty(m) if bias else None)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def factors(self) -> LowRank:
        return LowRank(self.up.weight.detach().flatten(1), self.down.weight.detach().flatten(1))

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "form": self.form, "geometry": self.geometry}

    def forward(self, input: Tensor) -> Tensor:
        """Images [B, C, H, W] -> [B, out, H', W']."""
        if self.rank == 0:  # PyTorch refuses convolutions without channels
            sizes = zip(input.shape[-2:], *(self.geometry[n] for n in ONE_BY_ONE), strict=True)
            shape = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
            y = input.new_zeros(len(input), self.out_features, *shape)
            return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
        return self.up(self.down(input))

    def as_stock(self) -> nn.Module:
        """The dense convolution."""
        W = self.dense_weight().view(self.out_features, *self.down.weight.shape[1:])
        return convolution(W, self.bias, self.geometry).train(self.training)
