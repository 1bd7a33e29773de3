"""ResSVD: residual compensation and partial-layer compression (Bai et al. 2025, arXiv:2505.20112).

    W1 = the truncation of W to k1 under G = E[x x^T];  W2 = the truncation of W - W1 to k - k1;  W' = W1 + W2;
    only the last N of L layers: each keeps 1 - p L / N of its parameters, so that the model keeps 1 - p.

Needs: the Gram matrix of the inputs. Stores: a factor pair of rank k. If both stages use one metric, W' is the truncation to
rank k (Eckart & Young), whatever k1: so the default second stage is a plain one, as in `nsvd`. The layers in front stay exact,
and no error reaches the others through them. Differs from the paper: the number of layers is given, not searched.
"""

from __future__ import annotations

import math

from corank.errors import CorankError
from corank.factorize import TwoStage, whitened
from corank.recipe import RankChoice, Recipe, register


@register("ressvd", family="weights", cite="arXiv:2505.20112")
def ressvd(share: float = 0.9, second: str = "plain", last: float = 1.0, precision: str = "auto") -> Recipe:
    """Truncation of the weight, then of what it left; of the last layers only, if wanted.

    Args:
        share: k1 / k.
        second: metric of the second stage, "plain" or "data".
        last: part of the layers that is compressed, from the end; 1: all.
        precision: "auto", "double" or "mixed".

    Raises:
        CorankError: last is not in (0, 1].
    """
    if not 0 < last <= 1:
        raise CorankError(f"last={last} is not a part of the layers; give a number above 0 and up to 1.")

    def rule(case: RankChoice) -> dict[str, int]:
        layers = sorted({site.layer for site in case.sites})
        chosen = set(layers[len(layers) - math.ceil(last * len(layers)) :])
        return case.proportional({site.name: 1.0 for site in case.sites if site.layer in chosen})

    return Recipe(
        statistics=("gram",),
        geometry=whitened,
        factorize=TwoStage(share, second, precision),
        rule=None if last == 1 else rule,
    )
