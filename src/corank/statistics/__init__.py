"""Streaming, mergeable statistics of what flows through a layer. They know tensors, not models.

Every statistic has ``update(...)``, ``merge(other)``, ``result()``, ``state()`` and ``from_state(state)``,
and says in ``needs`` what the model must supply.
"""

from __future__ import annotations

from corank.statistics.angular import AngularDistance
from corank.statistics.cross import Cross, CrossGram
from corank.statistics.fisher import Fisher, FisherDiagonal
from corank.statistics.gradient import ClippedGradientGram, GradientGram, OutputMetric
from corank.statistics.gram import Gram, InputGram
from corank.statistics.mean_gradient import MeanGradient, WeightGradient
from corank.statistics.moments import InputMoments, Moments
from corank.statistics.statistic import Statistic
from corank.statistics.tokens import NonFinite

STATISTICS: dict[str, type[Statistic]] = {
    "gram": InputGram,
    "moments": InputMoments,
    "cross": CrossGram,
    "fisher": FisherDiagonal,
    "gradient": GradientGram,
    "clipped-gradient": ClippedGradientGram,
    "gradient-mean": MeanGradient,
    "angular": AngularDistance,
}

__all__ = [
    "STATISTICS",
    "AngularDistance",
    "ClippedGradientGram",
    "Cross",
    "CrossGram",
    "Fisher",
    "FisherDiagonal",
    "Gram",
    "GradientGram",
    "InputGram",
    "InputMoments",
    "MeanGradient",
    "Moments",
    "NonFinite",
    "OutputMetric",
    "Statistic",
    "WeightGradient",
]
