"""Column interpolative decomposition (Gu & Eisenstat 1996; Voronin & Martinsson 2017).

    J = pivots of W D, D the RMS of the inputs;  C = W[:, J];  T = C^+ W;  y = C (x[J] + T' x[others]).

Needs: the Gram matrix of the inputs (its diagonal chooses J, all of it measures the loss). Stores: C, the part of T that is
not the identity, and J: r (m + n - r) + r values, smaller than dense at every rank.
"""

from __future__ import annotations

from corank.factorize import ColumnID, whitened
from corank.recipe import Recipe, register


@register("col-id", family="weights", cite="doi:10.1137/0917055")
def col_id(selector: str = "qr") -> Recipe:
    """Keep some input channels, express the others through them.

    Args:
        selector: how the columns are chosen: qr (column-pivoted), deim, qdeim, leverage, norm, maxvol, sketch, random.
    """
    return Recipe(statistics=("gram",), geometry=whitened, factorize=ColumnID(selector))
