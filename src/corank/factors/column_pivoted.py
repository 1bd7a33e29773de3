"""k columns of W' as they are, the others as combinations of them: k (m + n - k) + k values.

The mirror image of the row-pivoted kind (interpolative decomposition, Gu and Eisenstat 1996).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from corank.factors.base import FactorizedLinear, Factors, check_shapes, linear, product, values
from corank.factors.pivots import check_pivots, complement


@dataclass(frozen=True, eq=False)
class ColumnPivoted(Factors):
    """W'[:, pivots] = columns and W'[:, others] = columns @ rest, others = the sorted complement.

    Args:
        pivots: [k] distinct column indices, int32.
        columns: [m, k].
        rest: [k, n - k].

    Raises:
        CorankError: sizes disagree, or the pivots are not distinct columns.
    """

    kind: ClassVar[str] = "column_pivoted"
    pivots: Tensor
    columns: Tensor
    rest: Tensor

    def __post_init__(self) -> None:
        k = self.pivots.numel()
        check_shapes(
            self.kind,
            columns=(self.columns, (self.columns.shape[0], k)),
            rest=(self.rest, (k, self.rest.shape[1])),
        )
        check_pivots(self.kind, self.pivots, self.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.columns.shape[0], self.pivots.numel() + self.rest.shape[1]

    @property
    def rank(self) -> int:
        return self.pivots.numel()

    @staticmethod
    def count(m: int, n: int, rank: int) -> int:
        """k (m + n - k) + k, the last k being the indices."""
        return rank * (m + n - rank) + rank

    def flops(self, tokens: int) -> int:
        m, n = self.shape
        return 2 * tokens * self.rank * (m + n - self.rank)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(columns, T) with T[:, pivots] = I and T[:, others] = rest."""
        n, k = self.shape[1], self.rank
        T = self.rest.new_zeros(k, n)
        T[:, self.pivots.long()] = torch.eye(k, dtype=T.dtype, device=T.device)
        T[:, complement(self.pivots, n)] = self.rest
        return self.columns, T

    def dense(self) -> Tensor:
        W = self.columns.new_empty(self.shape)
        W[:, self.pivots.long()] = self.columns
        W[:, complement(self.pivots, self.shape[1])] = product(self.columns, self.rest)
        return W

    def module(self, bias: Tensor | None = None) -> ColumnPivotedLinear:
        return ColumnPivotedLinear(self.pivots, self.columns, self.rest, bias)


class ColumnPivotedLinear(FactorizedLinear):
    """y = up(x[pivots] + down(x[others])).

    `down` is rest [k, in - k], `up` is columns [out, k] and holds the bias, `pivots` [k] is a stored int32
    buffer from which `finalize` derives `others` [in - k].
    """

    kind: ClassVar[str] = "column_pivoted"
    pivots: Tensor
    others: Tensor

    def __init__(self, pivots: Tensor, columns: Tensor, rest: Tensor, bias: Tensor | None = None) -> None:
        k = pivots.numel()
        super().__init__((columns.shape[0], k + rest.shape[1]), k, like=columns)
        self.down = linear(rest)
        self.up = linear(columns, bias)
        self.register_buffer("pivots", pivots.detach().to(columns.device, torch.int32, copy=True))
        others = torch.empty(rest.shape[1], dtype=torch.int64, device=columns.device)
        self.register_buffer("others", others, persistent=False)
        self.finalize()

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        (m, n), k = spec["shape"], spec["rank"]
        columns = torch.empty(m, k, device=device, dtype=dtype)
        pivots = torch.arange(k, dtype=torch.int32, device=columns.device)
        return cls(pivots, columns, columns.new_empty(k, n - k), columns.new_empty(m) if bias else None)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def factors(self) -> ColumnPivoted:
        return ColumnPivoted(self.pivots, values(self.up), values(self.down))

    def finalize(self) -> None:
        """Derive the indices of the inputs that are not pivots."""
        if not self.pivots.is_meta:
            self.others = complement(self.pivots, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        return self.up(x.index_select(-1, self.pivots) + self.down(x.index_select(-1, self.others)))
