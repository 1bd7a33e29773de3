"""Cross moments between the inputs of the dense model and those of the partly compressed one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.statistics.gram import self_product, symmetric
from corank.statistics.precision import accumulation
from corank.statistics.statistic import Statistic
from corank.statistics.tokens import blocks, real_tokens


@dataclass(frozen=True, eq=False)
class Cross:
    """Joint second moments of dense inputs x and drifted inputs x^ over T tokens; all float64.

    Attributes:
        C: [n, n], E[x x^^T].
        H: [n, n], E[x^ x^^T], exactly symmetric.
        G: [n, n], E[x x^T], exactly symmetric.
        mean: [n], E[x].
        drifted_mean: [n], E[x^].
        count: T.
    """

    C: Tensor
    H: Tensor
    G: Tensor
    mean: Tensor
    drifted_mean: Tensor
    count: int


class CrossGram(Statistic):
    """Streams `Cross`, for targets anchored to the dense model (retargeting ``W C H^+``).

    Args:
        n: input features.
        device: where the sums live. None: where the first batch lives.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "drifted"})
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "sum_xz": ("n", "n"),
        "sum_zz": ("n", "n"),
        "sum_xx": ("n", "n"),
        "sum_x": ("n",),
        "sum_z": ("n",),
    }

    def __init__(self, n: int, device: torch.device | str | None = None) -> None:
        super().__init__({"n": n}, device)
        self.n = n

    def update(self, x_dense: Tensor, x_drifted: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch of both streams, token by token aligned.

        Args:
            x_dense: inputs of the layer in the dense model [..., n].
            x_drifted: inputs of the same layer, same tokens, in the partly compressed model [..., n].
            mask: [...], True at real tokens; None: all are real.

        Raises:
            CorankError: shapes differ; wrong width, dtype or mask.
            NonFinite: NaN or infinity in a real token of either stream; nothing has been added.
        """
        if x_dense.shape != x_drifted.shape:
            raise CorankError(
                f"Dense inputs {tuple(x_dense.shape)} and drifted inputs {tuple(x_drifted.shape)} differ in "
                "shape; feed both streams the same batch."
            )
        with accumulation(x_dense.device):
            dense = real_tokens(x_dense, mask, self.n, "dense inputs")
            drifted = real_tokens(x_drifted, mask, self.n, "drifted inputs").to(dense.device)
            for x, z in blocks(dense, drifted):
                self._add("sum_xz", x.T @ z)
                self._add("sum_zz", self_product(z))
                self._add("sum_xx", self_product(x))
                self._add("sum_x", x.sum(0, dtype=torch.float64))
                self._add("sum_z", z.sum(0, dtype=torch.float64))
            self.count += len(dense)

    def result(self) -> Cross:
        """Raises CorankError if no token was seen."""
        return Cross(
            C=self._mean("sum_xz"),
            H=symmetric(self._mean("sum_zz")),
            G=symmetric(self._mean("sum_xx")),
            mean=self._mean("sum_x"),
            drifted_mean=self._mean("sum_z"),
            count=self.count,
        )
