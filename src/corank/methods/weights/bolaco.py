"""Bolaco: Bayesian optimization of one share per kind of matrix (Ji et al., EMNLP Findings 2024, arXiv:2405.10616).

    C_y = E[(y - mean y)(y - mean y)^T];  Q = its top-k eigenvectors;  B = Q, A = Q^T W;  b' = b + (W - W') mean x;
    k from shares of (q and k), v, o, gate, up, down, the same in all layers:  min over shares of KL(dense || compressed).

Needs: Gram matrix and mean of the inputs; `trials` evaluations of the whole model on held-out windows, each of which
only cuts known decompositions at other ranks. Stores: a factor pair and a bias. Differs from the reference code: one
covariance over all text in place of the mean of those of groups of 32 sequences; 24 trials (50 there); proposals are scaled to the budget in
place of rejected outside of it; the value projections may be compressed too; the objective is the divergence from the
dense model on held-out text, without the perplexity.
"""

from __future__ import annotations

from corank.factorize import Spectral, whitened
from corank.recipe import Recipe, register


@register("bolaco", family="weights", cite="arXiv:2405.10616")
def bolaco(precision: str = "auto") -> Recipe:
    """Principal components of the outputs; a Gaussian process searches what each kind of matrix keeps.

    Args:
        precision: "auto", "double" or "mixed".
    """
    return Recipe(
        statistics=("gram",), geometry=whitened, factorize=Spectral(precision), affine=True, allocate="bolaco"
    )
