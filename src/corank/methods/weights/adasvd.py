"""AdaSVD: adaptive compensation of the truncation (Li et al. 2025, arXiv:2502.01403; no code was released).

    B, A = truncation of W under G = E[x x^T];  in turn  B = W H A^T (A H A^T)^-1,  A = B^+ W,  H = E[x^ x^^T];
    kept share of layer l:  floor + (mean - floor) s_l / mean(s),  s_l = cosine of what the layer gets and gives.

Needs: the Gram matrix of the dense inputs, the inputs of the partly compressed model, the angle each layer turns its
hidden state by. Stores: a factor pair. On the inputs of the truncation itself the updates could not change anything, it
being their optimum; so they are fitted to the shifted inputs, which the paper's batches stand for. The layers' shares are
`ratios=True`; the paper measures s at every matrix, here it is measured at every block.
"""

from __future__ import annotations

import math

from corank.errors import CorankError
from corank.factorize import Spectral, whitened
from corank.recipe import RankChoice, Recipe, register


def shares(distances: list[float], lowest: float) -> list[float]:
    """Weights of the layers, 1 on average: the part above `lowest` (a share of 1) follows their similarity.

    Args:
        distances: angle between input and output of each layer, over pi.
        lowest: in [0, 1].
    """
    similar = [max(math.cos(math.pi * d), 0.0) for d in distances]
    mean = sum(similar) / max(len(similar), 1)
    return [lowest + (1 - lowest) * (s / mean if mean > 0 else 1.0) for s in similar]


@register("adasvd", family="weights", cite="arXiv:2502.01403")
def adasvd(alternations: int = 2, ratios: bool = False, lowest: float = 0.5, precision: str = "auto") -> Recipe:
    """Truncation, then both factors fitted in turn to the inputs that the compressed model produces.

    Args:
        alternations: times that both are updated.
        ratios: give layers that change their input least (the most similar) more rank than others.
        lowest: of `ratios`, the part of the mean share that every layer gets.
        precision: "auto", "double" or "mixed".

    Raises:
        CorankError: lowest is not between 0 and 1.
    """
    if not 0 <= lowest <= 1:
        raise CorankError(f"lowest={lowest} is not a share; give a number between 0 and 1.")

    def rule(case: RankChoice) -> dict[str, int]:
        weight = shares(case.distances, lowest)
        return case.proportional({site.name: weight[site.layer] for site in case.sites})

    return Recipe(
        statistics=("gram", "angular") if ratios else ("gram",),
        geometry=whitened,
        factorize=Spectral(precision),
        rule=rule if ratios else None,
        target="shifted",
        start="dense",
        alternations=alternations,
    )
