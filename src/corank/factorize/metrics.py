"""The geometries that most recipes choose between: from the statistics of a site to the loss that is minimised."""

from __future__ import annotations

from collections.abc import Callable

from corank.factorize.geometry import Geometry
from corank.factorize.measured import Measured


def plain(_measured: Measured) -> Geometry:
    """The geometry that knows no data: ``|| W - W' ||_F``."""
    return Geometry()


def whitened(measured: Measured) -> Geometry:
    """The error of the outputs: ``|| (W - W') G^{1/2} ||_F`` with G = E[x x^T]."""
    return Geometry(measured.metric())


def two_sided(
    shrink_inputs: float, shrink_outputs: float, gradient: str = "gradient"
) -> Callable[[Measured], Geometry]:
    """What that error costs the model: ``|| R^{1/2} (W - W') G^{1/2} ||_F`` with R = E[g g^T], g = dLoss/dy.

    Args:
        shrink_inputs, shrink_outputs: weight of the identity in G and in R.
        gradient: the statistic that R is taken from.
    """

    def geometry(measured: Measured) -> Geometry:
        return Geometry(measured.metric(shrink_inputs), R=measured.output_metric(gradient, shrink_outputs))

    return geometry
