"""From a weight, a geometry and a rank to a storable factorization, with its predicted loss."""

from corank.factorize.cur import CURDecomposition
from corank.factorize.geometry import Factored, Factorizer, Geometry, Metric
from corank.factorize.interpolative import ColumnID, RowID
from corank.factorize.measured import Measured
from corank.factorize.metrics import plain, two_sided, whitened
from corank.factorize.residual import TwoStage
from corank.factorize.spectral import Spectral

__all__ = [
    "CURDecomposition",
    "ColumnID",
    "Factored",
    "Factorizer",
    "Geometry",
    "Measured",
    "Metric",
    "RowID",
    "Spectral",
    "TwoStage",
    "plain",
    "two_sided",
    "whitened",
]
