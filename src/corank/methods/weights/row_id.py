"""Row interpolative decomposition in the metric of the inputs (Gu & Eisenstat 1996; stored as in PIFA, arXiv:2501.19090).

    I = row pivots of W S, G = S S^T;  R = W[I];  Z = W G R^T (R G R^T)^+;  y[I] = R x, y[others] = Z' y[I].

Needs: the Gram matrix of the inputs. Stores: R, the part of Z that is not the identity, and I. The selected outputs are
exact, whatever the data.
"""

from __future__ import annotations

from corank.factorize import RowID, whitened
from corank.recipe import Recipe, register


@register("row-id", family="weights", cite="doi:10.1137/0917055")
def row_id(selector: str = "qr") -> Recipe:
    """Compute some outputs exactly, predict the others from them.

    Args:
        selector: how the rows are chosen: qr (row-pivoted), deim, qdeim, leverage, norm, maxvol, sketch, random.
    """
    return Recipe(statistics=("gram",), geometry=whitened, factorize=RowID(selector))
