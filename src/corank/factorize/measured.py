"""The statistics of one site, as a recipe's geometry sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from corank.factorize.geometry import Metric
from corank.statistics import Fisher, Gram, Moments, OutputMetric, WeightGradient


class Measured:
    """What was measured for one site.

    Args:
        results: name of a statistic -> its result; those of the input are the same objects for all siblings.
        memo: a dict shared by siblings, in which derived metrics are kept.
        affine: the metric is about the mean input.
    """

    def __init__(self, results: Mapping[str, Any], memo: dict[Any, Any] | None = None, affine: bool = False):
        self._results = results
        self._affine = affine
        self._memo = {} if memo is None else memo

    def _shared(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    @property
    def gram(self) -> Gram:
        """Second moment and mean of the inputs."""
        return self._results["gram"]

    @property
    def moments(self) -> Moments:
        """RMS and mean magnitude of each input channel."""
        return self._results["moments"]

    @property
    def fisher(self) -> Fisher:
        """Squared per-sample gradients of this site, summed over rows and over columns."""
        return self._results["fisher"]

    @property
    def mean_gradient(self) -> WeightGradient:
        """Mean gradient of the loss with respect to the weight of this site."""
        return self._results["gradient-mean"]

    @property
    def gradient(self) -> OutputMetric:
        """Second moment of the gradients at the output of this site."""
        return self._results["gradient"]

    def metric(self, shrink: float = 0.0) -> Metric:
        """The Gram matrix, shrunk, as a metric: one object, and so one root, for all siblings."""

        def compute() -> Metric:
            gram = self.gram.centred() if self._affine else self.gram
            return Metric((gram.shrink(shrink) if shrink else gram).G, shrink)

        return self._shared(("gram", shrink), compute)

    def output_metric(self, statistic: str = "gradient", shrink: float = 0.0) -> Tensor:
        """R [m, m], shrunk, from the statistic "gradient" or "clipped-gradient"."""
        result: OutputMetric = self._results[statistic]
        return (result.shrink(shrink) if shrink else result).R

    def diagonal(self, d: Tensor) -> Metric:
        """A diagonal metric, diag(G) = d [n]."""
        return Metric(d)
