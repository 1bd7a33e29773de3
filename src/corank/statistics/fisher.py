"""The diagonal of the empirical Fisher of a weight matrix, collapsed to its rows and its columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.statistics.precision import accumulation
from corank.statistics.statistic import Statistic
from corank.statistics.tokens import as_mask, blocks, real_tokens


@dataclass(frozen=True, eq=False)
class Fisher:
    """F_ij = E_b[(dL_b/dW_ij)^2], the mean over samples b of squared per-sample gradients, collapsed.

    Attributes:
        columns: float64 [n], sum_i F_ij: d_j^2 of FWSVD, ready as a diagonal input metric.
        rows: float64 [m], sum_j F_ij.
        count: samples.
    """

    columns: Tensor
    rows: Tensor
    count: int


class FisherDiagonal(Statistic):
    """Streams `Fisher` (FWSVD, arXiv:2207.00112).

    Per sample, exactly: ``dW_b = sum_t g_bt x_bt^T``, then its elementwise square. The square of a gradient
    averaged over a batch is a different quantity: there the per-sample noise, which is what the Fisher
    measures, averages out.

    Args:
        m: output features.
        n: input features.
        device: where the sums live. None: where the first batch lives.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "gradients"})
    axes: ClassVar[dict[str, tuple[str, ...]]] = {"sum_columns": ("n",), "sum_rows": ("m",)}

    def __init__(self, m: int, n: int, device: torch.device | str | None = None) -> None:
        super().__init__({"m": m, "n": n}, device)
        self.m, self.n = m, n

    def update(self, x: Tensor, g: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch of samples.

        Args:
            x: inputs [B, T, n].
            g: dL_b/dy [B, T, m], the gradient of each sample's own loss at the layer's output. If the loss is
                a mean over the batch, multiply by B first.
            mask: [B, T], True at real tokens; None: all are real. A sample without any is not counted.

        Raises:
            CorankError: not three-dimensional, shapes that do not match, wrong dtype or mask.
            NonFinite: NaN or infinity in a real token; nothing has been added.
        """
        if x.ndim != 3 or g.ndim != 3 or x.shape[:2] != g.shape[:2]:
            raise CorankError(
                f"The Fisher needs inputs [B, T, {self.n}] and gradients [B, T, {self.m}] of the same "
                f"samples; got {tuple(x.shape)} and {tuple(g.shape)}."
            )
        samples, tokens = x.shape[:2]
        with accumulation(x.device):
            inputs = real_tokens(x, mask, self.n, "inputs")
            gradients = real_tokens(g, mask, self.m, "gradients").to(inputs.device)
            lengths = [tokens] * samples if mask is None else as_mask(mask, x.shape[:2]).sum(1).tolist()
            for x_b, g_b in zip(inputs.split(lengths), gradients.split(lengths), strict=True):
                if len(x_b) == 0:
                    continue
                squared = sum((u.T @ v).double() for u, v in blocks(g_b, x_b)).square_()  # type: ignore[union-attr]
                self._add("sum_columns", squared.sum(0))
                self._add("sum_rows", squared.sum(1))
                self.count += 1

    def result(self) -> Fisher:
        """Raises CorankError if no sample was seen."""
        return Fisher(self._mean("sum_columns"), self._mean("sum_rows"), self.count)
