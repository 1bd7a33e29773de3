"""ACIP: one gradient descent, then any size (Genzel, Putzky et al. 2025, arXiv:2502.01717).

    W = sum_i z_i u_i (p_i W),   z = 1[m > 0],  dz/dm as of relu(m)
    min over m of KL(dense || gated) + lambda sum_i c_i relu(m_i),   lambda such that gates close from step to step
    score = m_i while z_i = 1;  0 when it becomes 0, and one less after every further step
    any size: the components with the lowest scores of all matrices go; r (m + n) >= m n is a dense matrix again

Needs: the Gram matrix of the inputs; `steps` forward and backward passes with the model in memory. Stores: factor pairs, or
dense matrices, and in `any-size/` the score map, from which `corank prune` makes every smaller size in seconds. Differs from
the paper: components of the whitened matrix (start=svd for those of the plain one); gates begin in the order of their energy
in place of all alike, because the steps here are dozens in place of tens of thousands, and components that go in one step are
in that order too; the penalty weighs a component by what it costs, and lambda follows what is open in place of a fixed
growth, and is never below what the slopes of the loss are; divergence from the dense model in place of the loss on the
text; no LoRA beside the gates, whose parameters no size would
count: heal a pruned model with `corank heal`, which keeps its size.
"""

from __future__ import annotations

from corank.errors import unknown
from corank.factorize import Spectral, plain, whitened
from corank.learning import Learning
from corank.recipe import Recipe, register

STARTS = ("whitened", "svd")


@register("acip", family="weights", cite="arXiv:2502.01717")
def acip(
    start: str = "whitened",
    to: float = 0.4,
    loss: str = "kd",
    prior: str = "energy",
    precision: str = "auto",
) -> Recipe:
    """One training gives an order of all components, and every size follows from it.

    Args:
        start: components of the matrix in the metric of its inputs, "whitened", or of the matrix itself, "svd".
        to: share of the parameters at which training ends.
        loss: "kd", divergence from the dense model, or "text", the loss on the text.
        prior: order in which the gates begin, "energy" or "none".
        precision: "auto", "double" or "mixed".
    """
    if start not in STARTS:
        raise unknown("start", start, STARTS)
    return Recipe(
        statistics=("gram",) if start == "whitened" else (),
        geometry=whitened if start == "whitened" else plain,
        factorize=Spectral(precision),
        allocate="acip",
        learning=Learning(to, loss, prior),
    )
