"""Columns, link, rows: W' = C M R in r (m + n) + r^2 values (CURing, arXiv:2501.04211)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from corank.factors.base import FactorizedLinear, Factors, check_shapes, linear, product, values
from corank.factors.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class CUR(Factors):
    """W' = C M R with r columns and r rows of W and a link between them.

    Args:
        C: [m, r], columns of W.
        M: [r, r], the link (U in most papers).
        R: [r, n], rows of W.

    Raises:
        CorankError: the link is not r x r.
    """

    kind: ClassVar[str] = "cur"
    C: Tensor
    M: Tensor
    R: Tensor

    def __post_init__(self) -> None:
        r = self.C.shape[1]
        check_shapes(self.kind, M=(self.M, (r, r)), R=(self.R, (r, self.R.shape[1])))

    @property
    def shape(self) -> tuple[int, int]:
        return self.C.shape[0], self.R.shape[1]

    @property
    def rank(self) -> int:
        return self.C.shape[1]

    @staticmethod
    def count(m: int, n: int, rank: int) -> int:
        """r (m + n) + r^2."""
        return rank * (m + n) + rank * rank

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.numel

    def pair(self) -> tuple[Tensor, Tensor]:
        """(C M, R)."""
        return product(self.C, self.M), self.R

    def dense(self) -> Tensor:
        return product(self.C, self.M, self.R)

    def merge(self) -> LowRank:
        """Absorb the link into the columns: the same matrix in r (m + n) values.

        To be done before casting to 16 bits: the link is ill-conditioned, C M is not.
        """
        return LowRank(*self.pair())

    def module(self, bias: Tensor | None = None) -> CURLinear:
        return CURLinear(self.C, self.M, self.R, bias)


class CURLinear(FactorizedLinear):
    """y = up(link(down(x))) with `down` R [r, in], `link` M [r, r], `up` C [out, r].

    The rows and columns are frozen; the link and the bias, on `up`, train.
    """

    kind: ClassVar[str] = "cur"
    frozen: ClassVar[tuple[str, ...]] = ("down", "up")

    def __init__(self, C: Tensor, M: Tensor, R: Tensor, bias: Tensor | None = None) -> None:
        super().__init__((C.shape[0], R.shape[1]), C.shape[1], like=C)
        self.down = linear(R, trainable=False)
        self.link = linear(M)
        self.up = linear(C, bias, trainable=False)

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        (m, n), r = spec["shape"], spec["rank"]
        C = torch.empty(m, r, device=device, dtype=dtype)
        return cls(C, C.new_empty(r, r), C.new_empty(r, n), C.new_empty(m) if bias else None)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def factors(self) -> CUR:
        return CUR(values(self.up), values(self.link), values(self.down))

    def finalize(self) -> None:
        """Freeze rows and columns again: a loader that replaces parameters also resets `requires_grad`."""
        self.down.weight.requires_grad_(False)
        self.up.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        return self.up(self.link(self.down(x)))
