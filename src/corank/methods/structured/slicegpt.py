"""SliceGPT with one basis for the whole residual stream (Ashkboos et al., ICLR 2024, arXiv:2401.15024).

    Q = leading d' eigenvectors of E[x x^T], x what all norms see;  embeddings E Q,  consumers W diag(gamma) Q,  producers Q^T W

Needs: second moments of the residual stream before every norm; the whole model in memory. Stores: a model of the same
family with a smaller hidden size; a head that was the embedding becomes a matrix of its own. Differs from the paper: one basis
in place of one at each norm, so that no maps between them are stored, the result is an ordinary model, and the budget
buys more dimensions; a basis at each norm would lose less at the same d'. Every token counts alike, whatever its magnitude.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("slicegpt", family="structured", cite="arXiv:2401.15024")
def slicegpt(multiple: int = 8) -> Structured:
    """Only the principal components of the residual stream stay.

    Args:
        multiple: the hidden size is a multiple of this.
    """
    return Structured(units=("residual",), statistics=("gram",), multiple_of=multiple)
