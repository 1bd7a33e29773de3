"""The dense matrix itself: m n values. The option that every allocator has besides the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from corank.factors.base import Factors, linear


@dataclass(frozen=True, eq=False)
class Dense(Factors):
    """W [m, n], stored as it is.

    Args:
        weight: [m, n].
    """

    kind: ClassVar[str] = "dense"
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def rank(self) -> int:
        return min(self.shape)

    @staticmethod
    def count(m: int, n: int, rank: int) -> int:
        """m n, whatever the rank."""
        return m * n

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.numel

    def pair(self) -> tuple[Tensor, Tensor]:
        """(I, W) or (W, I), whichever has the smaller inner size."""
        m, n = self.shape
        eye = torch.eye(self.rank, dtype=self.weight.dtype, device=self.weight.device)
        return (eye, self.weight) if m <= n else (self.weight, eye)

    def dense(self) -> Tensor:
        return self.weight

    def module(self, bias: Tensor | None = None) -> nn.Linear:
        return DenseLinear(self.weight, bias)


class DenseLinear(nn.Linear):
    """`nn.Linear` with the methods of the factorized layers; its weight is an ordinary parameter.

    Attributes:
        added_bias: the layer it replaces had no bias, this one has.
    """

    kind: ClassVar[str] = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.added_bias = False
        self.out_features, self.in_features = weight.shape
        plain = linear(weight, bias)
        self.weight, self.bias = plain.weight, plain.bias

    @property
    def rank(self) -> int:
        return min(self.out_features, self.in_features)

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the layer with uninitialised values, to be filled by a loader."""
        m, n = spec["shape"]
        empty = torch.empty(m, n, device=device, dtype=dtype)
        return cls(empty, empty.new_empty(m) if bias else None)

    def factors(self) -> Dense:
        """The matrix (a detached view)."""
        return Dense(self.weight.detach())

    def dense_weight(self) -> Tensor:
        """W [out, in], detached."""
        return self.weight.detach()

    def spec(self) -> dict[str, Any]:
        return {**self.factors().spec(), "bias": self.bias is not None}

    def finalize(self) -> None:
        """Nothing is derived."""
