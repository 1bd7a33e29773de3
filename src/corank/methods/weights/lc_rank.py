"""LC-rank: the rank of each layer learned by a penalty on its cost (Idelbayev and Carreira-Perpinan, CVPR 2020).

    min over W  L(W) + lam sum_l C_l(r_l),  rank(W_l) = r_l;   with mu the weight of the quadratic penalty, in turns
    L step   min over W   L(W) + mu / 2 sum_l || W_l - Theta_l ||^2
    C step   min over r   mu / 2 sum_{i > r} s_i^2 + lam C_l(r) for each layer;  Theta_l = the truncation of W_l to that rank

Needs: metric=fisher one forward and one backward pass, whitened one forward pass, plain no data; learn=true `steps` forward and
backward passes with the model in memory. Stores: a factor pair. The C step is an exact enumeration for each layer; lam
follows from the budget by bisection. Differs from the paper: one C step alone is the default, with s_i the singular values in a
metric, that of the second-order change of the loss, || R^{1/2} (W - W') G^{1/2} ||_F, in which layers are comparable without
training. Where no gradients can be had it falls back, with a warning, to metric=whitened. learn=true is the paper's loop, on
the calibration text and with plain singular values; losses in the report are then those against the trained matrices.
"""

from __future__ import annotations

from corank.errors import unknown
from corank.factorize import Spectral, plain, two_sided, whitened
from corank.recipe import Recipe, register
from corank.rule import RankChoice
from corank.training.rank_learning import RankLearning

METRICS = ("fisher", "whitened", "plain")


def learned(choice: RankChoice) -> dict[str, int]:
    """Stands for the ranks that training will name."""
    raise AssertionError("the model has not been trained")


@register("lc-rank", family="weights", cite="CVPR 2020, Idelbayev and Carreira-Perpinan")
def lc_rank(
    metric: str = "fisher",
    learn: bool = False,
    growth: float = 1.2,
    rate: float = 2e-5,
    shrink_inputs: float = 0.1,
    shrink_outputs: float = 0.3,
    precision: str = "auto",
) -> Recipe:
    """One price per parameter for all layers: each takes the rank at which the next one would not be worth it.

    Args:
        metric: of the singular values that are discarded: "fisher", "whitened", or "plain", the paper's.
        learn: train the weights towards the ranks, in turns with the choice of ranks, for `steps` steps.
        growth: factor of mu after every second step, with learn=true.
        rate: learning rate of the weights, with learn=true.
        shrink_inputs: weight of the identity in G, of metric=fisher.
        shrink_outputs: weight of the identity in R.
        precision: "auto", "double" or "mixed".
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    factorize = Spectral(precision)
    if learn:
        return Recipe(factorize=factorize, rule=learned, train=RankLearning(growth, rate=rate), steps=64)
    if metric == "plain":
        return Recipe(geometry=plain, factorize=factorize, allocate="lc-rank", currency="energy")
    inputs = Recipe(statistics=("gram",), geometry=whitened, factorize=factorize, allocate="lc-rank")
    if metric == "whitened":
        return inputs
    return Recipe(
        statistics=("gram", "clipped-gradient"),
        geometry=two_sided(shrink_inputs, shrink_outputs, "clipped-gradient"),
        factorize=factorize,
        allocate="lc-rank",
        currency="energy",
        fallback=inputs,
    )
