"""SliceGPT: only the principal components of the residual stream stay (Ashkboos et al., ICLR 2024, arXiv:2401.15024).

    Q = leading d' eigenvectors of E[x x^T], x what norms see;  embeddings E Q,  consumers W diag(gamma) Q,  producers Q^T W
    rotations=each    Q_i of its own at every norm, behind all that has been cut before; the stream passes through Q_j^T Q_i

Needs: second moments of the residual stream before every norm; the whole model in memory. Stores: with one basis, which is the
default, a model of the same family with a smaller hidden size; a head that was the embedding becomes a matrix of its own.
With rotations=each, as in the paper, two d' x d' maps in every block (loads with `import corank`); the last feed-forward output,
the last norm and the head keep their size, and so does an embedding that is the head. One basis buys more dimensions for the
same parameters; a basis at each norm loses less at the same d'. Differs from the paper: every token counts alike, whatever
its magnitude; no random rotation inside the kept space; embeddings are not centred, which only LayerNorm allows.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("slicegpt", family="structured", cite="arXiv:2401.15024")
def slicegpt(multiple: int = 8, rotations: str = "one") -> Structured:
    """Only the principal components of the residual stream stay.

    Args:
        multiple: the hidden size is a multiple of this.
        rotations: "one" basis for the whole stream, an ordinary checkpoint; "each" norm its own, with maps between them.
    """
    return Structured(units=("residual",), statistics=("gram",), multiple_of=multiple, rotations=rotations)
