"""Which part of a stored matrix one tensor-parallel rank holds.

Column parallelism gives a rank some rows of W', row parallelism some columns. Of W' = B A that is rows of B and all of A,
or all of B and columns of A. A pivoted kind has pivots among the rows (or columns) of W', so what a rank holds depends
on where they fall:

* rows R of a row-pivoted matrix: all k pivot rows P (every other row is made of them) and those rows of `rest` whose
  row of W' is in R. With z = P x, an output i in R is z[j] if i is pivot j, and (rest z)[i] if not. Both are found by one
  gather from (z, rest_R z).
* columns C of a column-pivoted matrix: all columns stored (they are outputs wide), and those columns of `rest` whose
  column of W' is in C. W'[:, C] x_C = columns (S x_C + rest_C x_C[others]), S x_C being x at the pivots in C and zero at
  the others: a gather from x_C with one zero appended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.factors.pivots import check_pivots, complement


def first_row(total: int, width: int, rank: int, world: int) -> int:
    """Where the rows of one rank begin.

    Args:
        total: rows of the stored matrix.
        width: rows that each rank holds.
        rank, world: of tensor parallelism.

    Returns:
        the first row. If the ranks hold more rows together than there are, equal slices go to neighbouring ranks, as vLLM
        does with key and value heads when there are fewer of them than ranks.

    Raises:
        CorankError: the rows cannot be dealt out evenly.
    """
    copies, uneven = divmod(width * world, max(total, 1))
    if uneven or copies < 1 or world % copies:
        raise CorankError(
            f"{total} outputs cannot be split over {world} ranks that hold {width} each; use another world size."
        )
    return rank // copies * width


def rows_of(total: int, widths: Sequence[int], rank: int, world: int, replicas: int = 1) -> Tensor:
    """The rows of a stored matrix that one rank holds, in the order of its outputs.

    Args:
        total: rows of the stored matrix.
        widths: rows that each rank holds of every logical matrix in it: one, or several where the checkpoint stores the
            fused matrix (query, key and value in one).
        rank, world: of tensor parallelism.
        replicas: how many ranks share one key/value head; the first logical matrix is never replicated.

    Returns:
        int64 [sum(widths)].

    Raises:
        CorankError: the stored matrix has another number of rows than its parts.
    """
    if len(widths) == 1:
        totals = [total]
    else:
        totals = next(
            (
                sizes
                for sizes in (
                    [widths[0] * world, *(width * world // replicas for width in widths[1:])],
                    list(widths),  # a layer that every rank holds whole
                )
                if sum(sizes) == total
            ),
            [],
        )
        if not totals:
            raise CorankError(
                f"A fused matrix with {total} outputs does not consist of {list(widths)} times {world} ranks."
            )
    rows, offset = [], 0
    for size, width in zip(totals, widths, strict=True):
        start = offset + first_row(size, width, rank, world)
        rows.append(torch.arange(start, start + width, device="cpu"))
        offset += size
    return torch.cat(rows)


def row_pivoted(pivots: Tensor, rest: Tensor, rows: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Rows of a row-pivoted matrix.

    Args:
        pivots: [k] row indices.
        rest: [total - k, k], the other rows in ascending order.
        rows: [r] the rows wanted.
        total: rows of W'.

    Returns:
        (rest_R [s, k], index [r]) with W'[rows] = cat(P, rest_R P)[index].

    Raises:
        CorankError: the pivots are not distinct rows.
    """
    check_pivots("row_pivoted", pivots, total)
    pivots, k = pivots.long(), pivots.numel()
    position = torch.cat([pivots, complement(pivots, total)]).argsort()[rows]
    others = position >= k
    kept = rest[position[others] - k]
    position[others] = k + torch.arange(kept.shape[0], device=pivots.device)
    return kept, position


def column_pivoted(pivots: Tensor, rest: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns start..stop-1 of the right factor T of a column-pivoted matrix W' = columns T.

    Args:
        pivots: [k] column indices.
        rest: [k, n - k], the other columns in ascending order.
        start, stop: the columns wanted.

    Returns:
        (take [k], others [s], rest_C [k, s]), all indices counted from `start`, with
        T[:, start:stop] x = append(x, 0)[take] + rest_C x[others]: pivots elsewhere take the zero at `stop - start`.

    Raises:
        CorankError: the pivots are not distinct columns.
    """
    total = pivots.numel() + rest.shape[1]
    check_pivots("column_pivoted", pivots, total)
    pivots, others = pivots.long(), complement(pivots, total)
    here, inside = (pivots >= start) & (pivots < stop), (others >= start) & (others < stop)
    take = torch.where(here, pivots - start, stop - start)
    return take, others[inside] - start, rest[:, inside]
