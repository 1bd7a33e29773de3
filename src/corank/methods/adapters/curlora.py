"""CURLoRA: a link between unimportant columns and rows, against forgetting (Fawi 2024, arXiv:2408.14572).

    W + alpha C M R,   C = W[:, J], R = W[I] frozen,  M [r, r] from zero;   column j is drawn with probability
    q_j ~ 1 / (p_j + floor),   p_j = ||W[:, j]||^2 / ||W||_F^2;   rows likewise

Trains: r^2 values a matrix. Needs: nothing. Differs from the reference code: there the floor is 0.001, far above the
p_j = 1/n of a wide matrix, so that the draw is all but uniform (here it is a thousandth of the mean p_j); columns are drawn
with replacement, so that some of M's directions are doubled (here without); and C M R is multiplied out at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corank.adaptation import Adaptation, adapter
from corank.errors import CorankError


def inverted(energies: Tensor, floor: float | None) -> Tensor:
    """The probabilities q [n] from the squared norms [n] of columns or rows."""
    p = energies / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny)
    q = 1 / (p + (1e-3 / len(p) if floor is None else floor))
    return q / q.sum()


@adapter("curlora", cite="arXiv:2408.14572")
def curlora(rank: int = 24, alpha: float = 1.0, floor: float | None = None) -> Adaptation:
    """Link between randomly drawn, preferably unimportant columns and rows.

    Args:
        rank: r.
        alpha: scale.
        floor: added to the probabilities before they are inverted; 0.001 for the published code's; none: 0.001 of
            their mean.
    """
    if floor is not None and floor <= 0:
        raise CorankError("floor must be positive: a column of zeros would have an infinite weight.")

    def choose(W: Tensor, measured: None, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        energy = W.double().square().cpu()
        rows, columns = inverted(energy.sum(1), floor), inverted(energy.sum(0), floor)
        return tuple(torch.multinomial(q, r, generator=generator) for q in (rows, columns))  # type: ignore[return-value]

    return Adaptation("ends", rank, choose, scale=alpha)
