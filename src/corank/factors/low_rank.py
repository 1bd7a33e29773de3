"""Two factors, W' = B A: k (m + n) values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from corank.factors.base import FactorizedLinear, Factors, check_shapes, linear, values


@dataclass(frozen=True, eq=False)
class LowRank(Factors):
    """W' = B A.

    Args:
        B: [m, k].
        A: [k, n].

    Raises:
        CorankError: the inner sizes differ.
    """

    kind: ClassVar[str] = "low_rank"
    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        check_shapes(self.kind, A=(self.A, (self.B.shape[1], self.A.shape[1])))

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @staticmethod
    def count(m: int, n: int, rank: int) -> int:
        """k (m + n)."""
        return rank * (m + n)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.numel

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def module(self, bias: Tensor | None = None) -> LowRankLinear:
        return LowRankLinear(self.B, self.A, bias)


class LowRankLinear(FactorizedLinear):
    """y = up(down(x)): `down` is A [k, in], `up` is B [out, k] and holds the bias."""

    kind: ClassVar[str] = "low_rank"

    def __init__(self, B: Tensor, A: Tensor, bias: Tensor | None = None) -> None:
        super().__init__((B.shape[0], A.shape[1]), B.shape[1], like=B)
        self.down = linear(A)
        self.up = linear(B, bias)

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
        return cls(B, B.new_empty(k, n), B.new_empty(m) if bias else None)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def factors(self) -> LowRank:
        return LowRank(values(self.up), values(self.down))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        return self.up(self.down(x))
