"""Where low rank begins to pay: the largest rank that is faster than dense, and the smallest matrix that can be."""

from __future__ import annotations

import math
from bisect import bisect_left

from corank.timing.device import Device
from corank.timing.kernels import matrix_seconds


def break_even_rank(
    shape: tuple[int, int], device: Device, tokens: int = 1, kind: str = "low_rank", multiple_of: int | None = None
) -> int | None:
    """The largest rank at which a factorized matrix takes less time than the dense one.

    Args:
        shape: (m, n).
        device: where.
        tokens: vectors per call: the batch in decoding, batch x length in prefill.
        kind: how it is stored.
        multiple_of: of the rank; None: the device's quantum.

    Returns:
        None where no rank above 0 is faster: the matrix should stay dense.
    """
    step = device.quantum if multiple_of is None else multiple_of
    dense = matrix_seconds(shape, None, device, tokens)
    ranks = range(step, min(shape) + 1, step)
    faster = bisect_left(ranks, True, key=lambda r: matrix_seconds(shape, r, device, tokens, kind) >= dense)
    return ranks[faster - 1] if faster else None


def break_even_size(keep: float, device: Device, extra_launches: float = 1) -> float:
    """The number of entries of a matrix from which low rank is faster in decoding: t0 bandwidth / (itemsize (1 - keep)).

    Of the bytes of the vectors, which are few against those of the matrix, it knows nothing.

    Args:
        keep: fraction of the parameters kept, below 1.
        device: where.
        extra_launches: launches more than the dense matrix has.
    """
    if keep >= 1:
        return math.inf
    return extra_launches * device.kernel_s * device.bytes_per_s / (device.itemsize * (1 - keep))
