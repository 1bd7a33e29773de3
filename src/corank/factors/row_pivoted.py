"""k rows of W' as they are, the others as combinations of them: k (m + n - k) + k values.

Every rank-k matrix has this form, so it is a lossless way to store any factor pair and it has no break-even
rank (interpolative decomposition, Gu and Eisenstat 1996; as a layer: PIFA, arXiv:2501.19090).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from corank.factors.base import FactorizedLinear, Factors, check_shapes, linear, product, values
from corank.factors.pivots import check_pivots, complement


@dataclass(frozen=True, eq=False)
class RowPivoted(Factors):
    """W'[pivots] = rows and W'[others] = rest @ rows, others = the sorted complement of the pivots.

    Args:
        pivots: [k] distinct row indices, int32.
        rows: [k, n].
        rest: [m - k, k].

    Raises:
        CorankError: sizes disagree, or the pivots are not distinct rows.
    """

    kind: ClassVar[str] = "row_pivoted"
    pivots: Tensor
    rows: Tensor
    rest: Tensor

    def __post_init__(self) -> None:
        k = self.pivots.numel()
        check_shapes(
            self.kind,
            rows=(self.rows, (k, self.rows.shape[1])),
            rest=(self.rest, (self.rest.shape[0], k)),
        )
        check_pivots(self.kind, self.pivots, self.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return self.pivots.numel() + self.rest.shape[0], self.rows.shape[1]

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
        """(B, rows) with B[pivots] = I and B[others] = rest."""
        m, k = self.shape[0], self.rank
        B = self.rest.new_zeros(m, k)
        B[self.pivots.long()] = torch.eye(k, dtype=B.dtype, device=B.device)
        B[complement(self.pivots, m)] = self.rest
        return B, self.rows

    def dense(self) -> Tensor:
        W = self.rows.new_empty(self.shape)
        W[self.pivots.long()] = self.rows
        W[complement(self.pivots, self.shape[0])] = product(self.rest, self.rows)
        return W

    def module(self, bias: Tensor | None = None) -> RowPivotedLinear:
        return RowPivotedLinear(self.pivots, self.rows, self.rest, bias)


class RowPivotedLinear(FactorizedLinear):
    """z = down(x), y = concat(z, up(z))[index] + bias: the pivot outputs, then the others, put in order.

    `down` is rows [k, in], `up` is rest [out - k, k], `pivots` [k] is a stored int32 buffer from which
    `finalize` derives `index` [out].

    Attributes:
        in_order: the pivots are the first outputs, so that nothing has to be put in order.
    """

    kind: ClassVar[str] = "row_pivoted"
    pivots: Tensor
    index: Tensor
    bias: nn.Parameter | None

    def __init__(self, pivots: Tensor, rows: Tensor, rest: Tensor, bias: Tensor | None = None) -> None:
        k = pivots.numel()
        super().__init__((k + rest.shape[0], rows.shape[1]), k, like=rows)
        self.down = linear(rows)
        self.up = linear(rest)
        own = None if bias is None else nn.Parameter(bias.detach().to(rows.dtype, copy=True))
        self.register_parameter("bias", own)
        self.register_buffer("pivots", pivots.detach().to(rows.device, torch.int32, copy=True))
        index = torch.empty(self.out_features, dtype=torch.int64, device=rows.device)
        self.register_buffer("index", index, persistent=False)
        self.in_order = False
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
        rows = torch.empty(k, n, device=device, dtype=dtype)
        pivots = torch.arange(k, dtype=torch.int32, device=rows.device)
        return cls(pivots, rows, rows.new_empty(m - k, k), rows.new_empty(m) if bias else None)

    def factors(self) -> RowPivoted:
        return RowPivoted(self.pivots, values(self.down), values(self.up))

    def finalize(self) -> None:
        """Derive the gather index: stored order is (pivots, others), `index` is its inverse permutation."""
        if not self.pivots.is_meta:
            others = complement(self.pivots, self.out_features)
            order = torch.cat([self.pivots.long(), others])
            self.index = order.argsort()
            self.in_order = bool((order[1:] > order[:-1]).all())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        z = self.down(x)
        y = torch.cat([z, self.up(z)], dim=-1)
        y = y if self.in_order else y.index_select(-1, self.index)
        # Under autocast y is 16-bit while the bias is not; nn.Linear would return 16 bits as well.
        return y if self.bias is None else y + self.bias.to(y.dtype)
