"""From a padded batch to the rows that count."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from corank.errors import CorankError

#: Tokens per matrix product; the float32 product is then added into the float64 buffer.
FLUSH = 32768

# Squares and sums of float32 values inside this range neither overflow nor underflow.
_SAFE_LOW, _SAFE_HIGH = 1e-15, 1e15


class NonFinite(CorankError):
    """NaN or infinity among the real (unmasked) tokens of a batch. The statistic is unchanged.

    Attributes:
        what: which tensor, e.g. ``"inputs"``.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"The {what} contain NaN or infinity; run the calibration in bfloat16 or float32 "
            "(float16 overflows), or take the offending text out of the calibration set."
        )


def as_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """Check a padding mask and return it as bool.

    Args:
        mask: bool (or integer 0/1), True at real tokens.
        shape: the leading dimensions of the batch it belongs to.

    Raises:
        CorankError: if the shape differs, or the mask is floating point (an additive attention bias).
    """
    if mask.is_floating_point():
        raise CorankError("The mask is floating point; give a bool mask that is True at real tokens.")
    if mask.shape != shape:
        raise CorankError(
            f"The mask has shape {tuple(mask.shape)} but the batch has {tuple(shape)}; "
            "give one entry per token, without the feature dimension."
        )
    return mask.bool()


def real_tokens(x: Tensor, mask: Tensor | None, width: int, what: str) -> Tensor:
    """Rows of the real tokens; masked positions are dropped, so what they hold cannot matter.

    Args:
        x: floating point [..., width].
        mask: [...], True at real tokens, or None if all are.
        width: the feature dimension expected.
        what: what to call ``x`` in an error.

    Returns:
        [T, width] in the dtype of ``x``, or in float64 where squares would leave the range of float32.

    Raises:
        CorankError: wrong width, dtype or mask.
        NonFinite: NaN or infinity in a real token.
    """
    if x.ndim < 2 or x.shape[-1] != width:
        raise CorankError(f"The {what} have shape {tuple(x.shape)}; expected [..., tokens, {width}].")
    if not x.is_floating_point():
        raise CorankError(f"The {what} have dtype {x.dtype}; a floating-point tensor is needed.")
    x = x.detach()
    if x.device.type == "mps":  # no float64 there
        x = x.cpu()
    if mask is None:
        rows = x.reshape(-1, width)
    else:
        rows = x[as_mask(mask, x.shape[:-1]).to(x.device)]
    if rows.numel() == 0:
        return rows
    low, high = torch.aminmax(rows)  # both are NaN if any entry is
    peak = max(abs(low.item()), abs(high.item()))
    if peak != peak or peak == float("inf"):
        raise NonFinite(what)
    if peak and not _SAFE_LOW < peak < _SAFE_HIGH:
        return rows.double()
    return rows


def blocks(*streams: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut equally long row streams into blocks of at most ``FLUSH`` rows in one common working dtype.

    Args:
        streams: [T, ...] each.

    Yields:
        One tuple per block: float64 if any stream is, else float32.
    """
    working = torch.float64 if any(rows.dtype == torch.float64 for rows in streams) else torch.float32
    for block in zip(*(rows.split(FLUSH) for rows in streams), strict=True):
        yield tuple(rows.to(working) for rows in block)
