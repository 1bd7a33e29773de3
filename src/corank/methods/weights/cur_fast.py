"""Interpolation or CUR in seconds: no SVD, a Gaussian sketch, LU pivots, one least squares ("Simpler is better", Dong &
Martinsson, arXiv:2104.05877, and its GPU form arXiv:2310.09417).

    Y = Omega (W D), Omega Gaussian with r + 10 rows;  J = LU pivots of Y^T;  T = C^+ W,  C = W[:, J].

Needs: RMS of the inputs. Stores: as `col-id` (or `curing`, with form=cur). 2 m n (r + 10) operations choose J.
"""

from __future__ import annotations

from corank.errors import unknown
from corank.factorize import ColumnID, CURDecomposition, Factorizer, Geometry, Measured, RowID
from corank.recipe import Recipe, register


@register("cur-fast", family="weights", cite="arXiv:2310.09417")
def cur_fast(form: str = "column") -> Recipe:
    """Columns chosen by LU pivots of a sketch.

    Args:
        form: "column" (C and its coefficients), "row" (R and its coefficients), or "cur" (columns, link, rows).
    """
    forms: dict[str, Factorizer] = {
        "column": ColumnID("sketch"),
        "row": RowID("sketch"),
        "cur": CURDecomposition("sketch", importance="signed", weighted=True),
    }
    if form not in forms:
        raise unknown("form", form, forms)

    def geometry(measured: Measured) -> Geometry:
        return Geometry(measured.diagonal(measured.moments.rms.square()))

    return Recipe(statistics=("moments",), geometry=geometry, factorize=forms[form])
