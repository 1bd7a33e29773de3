"""SlimGPT: the Optimal Brain Surgeon on heads and channels (Ling et al., NeurIPS 2024, arXiv:2412.18110).

    remove  argmin_G tr(W_G ([C^-1]_GG)^-1 W_G^T),  let the other columns take over what they can,  C^-1 <- Schur complement;
    again until enough are gone; shares phi_l ~ 1/4 + 3/4 ln(1 + l) / ln(L);  C = E[z z^T] of the inputs really seen

Needs: second moments of the inputs of the output and down projections, of each block behind those that are narrowed
already. Stores: narrower matrices. Differs from the reference code: one column at a time (there up to 1024); heads by the
exact joint loss of their columns in place of the diagonal of a Cholesky factor, and whole key-value heads; the weights that
stay are solved for once at the end, in float64, which is the same least squares solution without the drift; the
schedule is scaled to the budget and uses the number of blocks that there are.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("slimgpt", family="structured", cite="arXiv:2412.18110")
def slimgpt(attention: bool = True) -> Structured:
    """The cheapest unit goes, the others make up for it, and so on.

    Args:
        attention: take heads out too.
    """
    return Structured(
        units=("channels", "heads") if attention else ("channels",),
        score="greedy",
        compensate="ls",
        allocate="log",
        sequential=True,
        statistics=("gram",),
    )
