"""How far a block of layers turns the hidden state: small angles mark blocks that matter little."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.statistics.precision import accumulation
from corank.statistics.statistic import Statistic
from corank.statistics.tokens import as_mask, real_tokens


def angle(u: Tensor, v: Tensor) -> Tensor:
    """``arccos(cos(u, v)) / pi`` of paired rows, in float64; a zero vector is orthogonal to all others.

    Args:
        u, v: [B, d].

    Returns:
        float64 [B] in [0, 1]; two zero vectors are at distance 0.
    """
    u, v = u.double(), v.double()
    # Scaling by the largest entry keeps the squares in range and the angle as it is.
    u = u / u.abs().amax(1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
    v = v / v.abs().amax(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    norms = u.norm(dim=1) * v.norm(dim=1)
    cosine = (u * v).sum(1) / norms.clamp_min(torch.finfo(u.dtype).tiny)
    distance = torch.arccos(cosine.clamp(-1.0, 1.0)) / torch.pi
    both_zero = (u == 0).all(1) & (v == 0).all(1)
    return distance.masked_fill(both_zero, 0.0)


class AngularDistance(Statistic):
    """Streams the mean over samples of ``arccos(cos(h_in, h_out)) / pi`` at the last real token.

    Source: CURing (arXiv:2501.04211); "The Unreasonable Ineffectiveness of the Deeper Layers".

    Args:
        device: where the sum lives. None: where the first batch lives.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    axes: ClassVar[dict[str, tuple[str, ...]]] = {"sum_angle": ()}

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__({}, device)

    def update(self, h_in: Tensor, h_out: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch of samples.

        Args:
            h_in: hidden states before the block [B, T, d].
            h_out: hidden states after it [B, T, d].
            mask: [B, T], True at real tokens; None: all are real. A sample without any is not counted.

        Raises:
            CorankError: shapes that are not [B, T, d] or differ; wrong dtype or mask.
            NonFinite: NaN or infinity in any real token; nothing has been added.
        """
        if h_in.ndim != 3 or h_in.shape != h_out.shape:
            raise CorankError(
                "The angular distance needs two hidden states of shape [B, T, d]; "
                f"got {tuple(h_in.shape)} and {tuple(h_out.shape)}."
            )
        samples, tokens, width = h_in.shape
        with accumulation(h_in.device):
            before = real_tokens(h_in, mask, width, "hidden states")
            after = real_tokens(h_out, mask, width, "hidden states").to(before.device)
            if mask is None:
                real = torch.ones(samples, tokens, dtype=torch.bool, device=before.device)
            else:
                real = as_mask(mask, h_in.shape[:2]).to(before.device)
            # Real tokens lie in reading order, so the last one of each sample ends its run of rows.
            lengths = real.sum(1)
            ends = (lengths.cumsum(0) - 1)[lengths > 0]
            if len(ends):
                self._add("sum_angle", angle(before[ends], after[ends]).sum())
                self.count += len(ends)

    def result(self) -> float:
        """The mean distance in [0, 1]. Raises CorankError if no sample was seen."""
        return float(self._mean("sum_angle"))
