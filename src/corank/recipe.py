"""Recipes: a method is data over the stages of one engine. (The registry of methods is in `corank.registry`.)

A method is a registered function that returns a `Recipe`; its signature is its hyper-parameter schema, from which
the command line, YAML files and the docs are made:

    @register("asvd", family="weights", cite="arXiv:2312.05821")
    def asvd(alpha: float = 0.5) -> Recipe: ...
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from corank.budget import ALLOCATORS, MEASURED
from corank.errors import CorankError, unknown
from corank.factorize import Factorizer, Geometry, Measured, Spectral, plain
from corank.learning import Learning
from corank.registry import _METHODS as _METHODS
from corank.registry import Method as Method
from corank.registry import from_yaml as from_yaml
from corank.registry import get as get
from corank.registry import methods as methods
from corank.registry import register as register
from corank.registry import to_yaml as to_yaml
from corank.rule import RankChoice as RankChoice
from corank.rule import Rule

TARGETS = ("dense", "shifted", "anchored", "mixed", "adaptive")
STARTS = ("target", "dense")
LABELS = ("data", "sampled", "top5")
FAMILIES = ("factorize", "narrow", "both", "auto")
SHARES = ("none", "pairs", "siblings", "layers", "auto")


@dataclass(frozen=True)
class Recipe:
    """What a method does at each stage.

    Attributes:
        statistics: names of what to measure (`corank.statistics.STATISTICS`).
        geometry: from the statistics of a site to the loss that is minimised.
        factorize: from a weight and a geometry to factors.
        allocate: name of the allocator that distributes the budget.
        currency: what an allocator adds up over the sites: "relative", each site's loss as a share of its energy, or
            "energy", the loss itself.
        rule: the paper's own rank rule, in place of an allocator; None: `allocate` is used.
        target: what the factorized layer should reproduce: "dense" W on the dense model's inputs (one shot), "shifted"
            W on the inputs it will really see, "anchored" the dense model's output from the inputs it will really see,
            "mixed" something between the last two, "adaptive" the mix that keeps the largest share of energy at each site.
        mix: share of the dense model's output in a mixed target: 0 is shifted, 1 is anchored.
        ridge: pull of an anchored or mixed target towards W, relative to the mean square of the inputs; where the geometry
            shrinks the inputs' metric, that shrinkage takes its place.
        start: what is factorized before a refit: "target", what the refit aims at, or "dense", W on the dense model's
            inputs.
        labels: what gradients are taken of: "data", the loss on the text itself (empirical Fisher), "sampled", on tokens
            drawn from the model's predictions (true Fisher), or "top5" (any number), the same among the most probable
            tokens alone.
        refit: refit B by least squares on the inputs the layer will really see (SVD-LLM's update).
        alternations: times that both factors are refitted in turn on these inputs.
        affine: measure about the mean input and let the bias absorb the mean (LoRD); needs the statistic "gram".
        pack: store the result in pivoted form, which is smaller at the same rank.
        share: which matrices read one basis, W'_i = B_i A: "none", "pairs" (q and k, gate and up), "siblings", all that
            have the same input, "layers", those of neighbouring layers, or "auto", wherever one basis loses less than
            several at the same cost.
        group: number of neighbouring layers that share.
        families: what may be done to the matrices: "factorize" each of them, "narrow" the channels and heads between them,
            or "both", wherever one loses less than the other at the same cost; "auto": both, if the other settings allow it.
        targets: roles, globs or ``re:`` patterns of the sites to compress; None: all.
        ignore: the same, of sites to leave alone.
        floor: lowest rank, as a fraction of the uniform one.
        multiple_of: ranks are multiples of this; 0 (`auto`): of what this machine's products are fastest at.
        probe_windows: held-out windows on which an allocator that looks at the model compares its predictions.
        trials: whole choices of ranks that allocate=bolaco tries.
        steps: of training, for allocators that learn ranks (ara, dobi-svd, acip).
        learning: how allocate=acip trains.
        heal: how the result is trained afterwards (`corank.heal.ways`), "none" for closed forms alone.
        epochs: passes of that training over the calibration text.
        minutes: its end by the clock, if that comes first, and that of the training of allocate=acip; None for none.
        fallback: what to do, with a warning, where gradients cannot be had; None: that is an error.
        train: trains the dense model first, in memory and in place, and names ranks for `rule` to hand on; an allocator that
            is asked for takes its place. Called with (job, directory for its state or None).
    """

    statistics: tuple[str, ...] = ()
    geometry: Callable[[Measured], Geometry] = plain
    factorize: Factorizer = dataclasses.field(default_factory=Spectral)
    allocate: str = "uniform"
    currency: str = "relative"
    rule: Rule | None = None
    target: str = "dense"
    mix: float = 0.5
    ridge: float = 1e-3
    start: str = "target"
    labels: str = "data"
    refit: bool = False
    alternations: int = 0
    affine: bool = False
    pack: bool = False
    share: str = "none"
    group: int = 2
    families: str = "factorize"
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    floor: float = 0.0
    multiple_of: int = 1
    probe_windows: int = 4
    trials: int = 24
    steps: int = 64
    learning: Learning = Learning()
    heal: str = "none"
    epochs: float = 2.0
    minutes: float | None = None
    fallback: Recipe | None = None
    train: Callable[..., Mapping[str, int]] | None = None

    COMMON: ClassVar[tuple[str, ...]] = (
        "allocate",
        "currency",
        "target",
        "mix",
        "ridge",
        "start",
        "labels",
        "refit",
        "alternations",
        "affine",
        "pack",
        "share",
        "group",
        "targets",
        "ignore",
        "floor",
        "multiple_of",
        "probe_windows",
        "trials",
        "steps",
        "heal",
        "epochs",
        "minutes",
    )

    def __post_init__(self) -> None:
        if self.allocate not in ALLOCATORS:
            raise unknown("allocator", self.allocate, ALLOCATORS)
        if self.allocate == "zs-svd" and self.rule is None and "gradient-mean" not in self.statistics:
            object.__setattr__(self, "statistics", (*self.statistics, "gradient-mean"))
        if self.allocate == "swift-svd" and "angular" not in self.statistics:  # it weighs layers by what they change
            object.__setattr__(self, "statistics", (*self.statistics, "angular"))
        if self.target not in TARGETS:
            raise unknown("target", self.target, TARGETS)
        if self.labels not in LABELS and not re.fullmatch(r"top[1-9]\d*", self.labels):
            raise unknown("kind of labels", self.labels, LABELS)
        if self.labels == "top1":
            raise CorankError("labels=top1 leaves nothing to choose between; give top2 or more.")
        if self.start not in STARTS:
            raise unknown("start", self.start, STARTS)
        if not 0 <= self.mix <= 1 or not (math.isfinite(self.ridge) and self.ridge >= 0) or self.alternations < 0:
            raise CorankError("mix must be between 0 and 1, and ridge and alternations must not be negative.")
        if self.currency not in ("relative", "energy"):
            raise unknown("currency", self.currency, ("relative", "energy"))
        if self.multiple_of < 0 or not 0 <= self.floor <= 1:
            raise CorankError("multiple_of must be at least 1, or auto, and floor between 0 and 1.")
        if min(self.probe_windows, self.trials, self.steps) < 1:
            raise CorankError("probe_windows, trials and steps must be at least 1.")
        if self.heal != "none":
            from corank.heal.way import way  # training is not needed to compress

            way(self.heal)
        if not (self.epochs >= 0 and math.isfinite(self.epochs)):
            raise CorankError("epochs must not be negative.")
        if self.minutes is not None and not self.minutes > 0:
            raise CorankError("minutes must be more than zero.")
        if self.share not in SHARES:
            raise unknown("kind of sharing", self.share, SHARES)
        if self.group < 1:
            raise CorankError("group must be at least 1 layer.")
        self._check_sharing()
        self._check_families()
        if "gradient-mean" in self.statistics and self.labels != "data":
            raise CorankError(
                f"labels={self.labels} makes the mean gradient pure noise; allocate=zs-svd needs labels=data."
            )
        if self.affine and "gram" not in self.statistics:
            raise CorankError("affine=true needs a method that measures the Gram matrix, such as svd-llm.")
        if self.refits and self.factorize.kind != "low_rank":
            setting = "refit=true" if self.refit else f"alternations={self.alternations}"
            raise CorankError(
                f"{setting} needs a method that yields two free factors, such as svd-llm; selected "
                "columns and rows cannot be refitted."
            )
        if self.start == "dense" and self.target != "dense" and not self.refits:
            raise CorankError(
                f"start=dense factorizes for the dense model's inputs, and nothing would move the factors to the "
                f"{self.target} target; set refit=true or alternations=1 as well."
            )

    def _check_families(self) -> None:
        if self.families not in FAMILIES:
            raise unknown("choice of families", self.families, FAMILIES)
        missing = self._missing_to_narrow()
        if missing and self.families in ("narrow", "both"):
            raise CorankError(f"families={self.families} needs {', '.join(missing)}.")

    def _missing_to_narrow(self) -> list[str]:
        """Widths are chosen with ranks by what both lose, added up over the model, at the dense model's inputs."""
        wanted = {
            "a method that truncates": type(self.factorize) is Spectral,
            "allocate=lagrange or knapsack": self.rule is None and self.allocate in ("lagrange", "knapsack"),
            "currency=energy": self.currency == "energy",
            "target=dense and no refit": not self.sequential,
            "affine=false": not self.affine,
            "share=none": self.share == "none",
        }
        return [what for what, there in wanted.items() if not there]

    @property
    def narrowing(self) -> str:
        """`families`, "auto" being decided."""
        if self.families != "auto":
            return self.families
        return "factorize" if self._missing_to_narrow() else "both"

    def _check_sharing(self) -> None:
        """Sharing is one truncation of several matrices at the dense model's inputs, by an allocator that adds up curves."""
        if self.share == "none":
            return
        reason = ""
        if type(self.factorize) is not Spectral:
            reason = "a method that truncates, such as svd-llm"
        elif self.target != "dense":
            reason = "target=dense"
        elif self.alternations:
            reason = "alternations=0, as the basis is not one layer's to move"
        elif self.looks:
            reason = (
                f"an allocator that goes by curves, such as lagrange; {self.allocate} looks at every matrix on its own"
            )
        elif self.rule is not None:
            reason = "an allocator; set allocate=lagrange"
        if reason:
            raise CorankError(f"share={self.share} needs {reason}.")

    @property
    def kind(self) -> str:
        """The kind of factors that is stored."""
        return "row_pivoted" if self.pack and self.factorize.kind != "column_pivoted" else self.factorize.kind

    @property
    def looks(self) -> bool:
        """Whether ranks are chosen by what is measured on the model itself, on text."""
        return self.rule is None and self.allocate in MEASURED

    @property
    def refits(self) -> bool:
        """Whether factors are fitted again to the inputs that the layer will really see."""
        return self.refit or self.alternations > 0

    @property
    def sequential(self) -> bool:
        """Whether the second activation stream, of the compressed model, is needed."""
        return self.target != "dense" or self.refits

    @property
    def drifted(self) -> bool:
        """Whether the geometry is that of the inputs that the compressed model produces."""
        return self.target != "dense" and self.start == "target"

    @property
    def anchored(self) -> bool:
        """Whether outputs of the dense model are part of what is to be reproduced."""
        return self.target in ("anchored", "mixed", "adaptive")

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration data."""
        return bool(self.statistics) or self.sequential or self.looks or self.train is not None

    @property
    def needs_budget(self) -> bool:
        """Whether it has no rule of its own that says how large the result is."""
        return self.rule is None or self.train is not None

    def overridden(self, fields: Mapping[str, Any]) -> Recipe:
        """The same with some fields set; an allocator that is asked for replaces the paper's own rule."""
        fields = {**fields, "rule": None} if "allocate" in fields else dict(fields)
        if self.fallback is not None:
            fields["fallback"] = dataclasses.replace(self.fallback, **fields)
        return dataclasses.replace(self, **fields)
