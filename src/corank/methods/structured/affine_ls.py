"""Affine least squares: corank's own way to do without units of a block.

    J by greedy removal under S = Cov(z^);  W' = W Cov(z, z^)[:, J] S_JJ^+,  b' = b + W E[z] - W' E[z^_J]

z is the hidden vector in the dense model, z^ the one that comes once the blocks before it are narrowed: the product of z with
the dense matrix is what is aimed at. Needs: means and joint second moments of the inputs of the output and down projections
in both. Stores: narrower matrices and two biases per block. FLAP is the case W' = W_J, MoDeGPT's feed-forward part the case
without a bias and with z^ = z: for the same units neither can lose less on calibration data.
"""

from __future__ import annotations

from corank.recipe import register
from corank.structured.recipe import Structured


@register("affine-ls", family="structured", cite="corank")
def affine_ls(attention: bool = False, selector: str = "greedy") -> Structured:
    """Channels that the others can stand in for go; matrix and bias are the best for what stays.

    Args:
        attention: take heads out too.
        selector: score of units.
    """
    return Structured(
        units=("channels", "heads") if attention else ("channels",),
        score=selector,
        compensate="affine-ls",
        sequential=True,
        anchored=True,
        statistics=("gram",),
    )
