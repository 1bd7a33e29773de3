"""CURing's adapter: only the link between chosen columns and rows trains (Park & Moon 2025, arXiv:2501.04211).

    dense W:       W + C M R   with C = W[:, J], R = W[I] by CURing's rule, DEIM on the SVD of |W| diag(rms x);  M = 0 at first
    compressed:    C (M0 + M) R, and B (I + M) A of any other pair of factors: what trains keeps the layer's kind and rank

Trains: r^2 values a matrix, whatever its size. Needs: nothing, or calibration text for the RMS of the inputs.
The reference code of the paper trains the link of a compressed model; this is the same parameter counted from where it starts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corank.adaptation import Adaptation, adapter
from corank.errors import unknown
from corank.factorize import Measured
from corank.linalg import SELECTORS, select


@adapter("curing", cite="arXiv:2501.04211")
def curing(rank: int = 64, selector: str = "deim", signed: bool = False) -> Adaptation:
    """Link between informative columns and rows of W; the link of a layer that is compressed already.

    Args:
        rank: r, of dense layers. A compressed layer has its own.
        selector: "deim" (textbook), "curing-v1" (the reference code's loop), or any other.
        signed: choose on W diag(rms x) instead of |W| diag(rms x), as CURing's later program does.
    """
    if selector not in SELECTORS:
        raise unknown("selector", selector, SELECTORS)

    def choose(W: Tensor, measured: Measured | None, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        S = W.double() if signed else W.double().abs()
        S = S if measured is None else S * measured.moments.rms.to(S.device)
        return (
            select(S, r, selector, axis=0, generator=generator),
            select(S, r, selector, axis=1, generator=generator),
        )

    return Adaptation("ends", rank, choose, statistics=("moments",), link=True)
