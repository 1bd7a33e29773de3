"""FWSVD: Fisher-weighted SVD (Hsu et al., ICLR 2022, arXiv:2207.00112).

    F = E[(dL/dW)^2] per sample;  d_j^2 = sum_i F_ij;  min || (W - W') diag(d) ||_F.

Needs: one backward pass of the language-model loss. Stores: a factor pair. Differs from re-implementations for language
models: gradients are squared per sample, not after averaging over a batch, which would leave mostly noise.
"""

from __future__ import annotations

from corank.factorize import Geometry, Measured, Spectral
from corank.recipe import Recipe, register


@register("fwsvd", family="weights", cite="arXiv:2207.00112")
def fwsvd(precision: str = "auto") -> Recipe:
    """SVD weighted by the Fisher information of each input channel.

    Args:
        precision: "auto", "double" or "mixed".
    """

    def geometry(measured: Measured) -> Geometry:
        d = measured.fisher.columns.sqrt()
        d = d.clamp_min(1e-6 * float(d.max()))  # a channel that no sample's loss depends on keeps a little weight
        return Geometry(measured.diagonal(d.square()))

    return Recipe(statistics=("fisher",), geometry=geometry, factorize=Spectral(precision))
