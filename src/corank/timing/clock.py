"""Time as the currency of a budget: what a matrix costs in nanoseconds, at every rank and when dense.

Every matrix is taken on its own, with its own launches: times add up then, as the allocators need it, and a runtime that
packs matrices together can only be faster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

from corank.budget import Curve
from corank.budget.options import options_of
from corank.errors import CorankError
from corank.model import Site
from corank.timing.device import Device
from corank.timing.kernels import Kernel, kernels_of, parts_at


@dataclasses.dataclass(frozen=True)
class Clock:
    """Predicts the time of single matrices.

    Attributes:
        device: where.
        batch: sequences.
        tokens: new tokens of each: 1 is decoding, more is the prefill of a prompt.
    """

    device: Device
    batch: int = 1
    tokens: int = 1
    _known: dict[tuple[object, ...], float] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def seconds(self, site: Site, kind: str, rank: int | None) -> float:
        """Seconds of one matrix at a rank, or dense for None; of an expert, what is to be expected."""
        key = (kind, site.shape, rank, site.form, site.share, site.role == "lm_head")
        if key not in self._known:
            self._known[key] = self._seconds(site, kind, rank)
        return self._known[key]

    def _seconds(self, site: Site, kind: str, rank: int | None) -> float:
        # of a prompt the head scores the last position only
        many = self.batch * (1 if site.role == "lm_head" else self.tokens)
        used = 1 - (1 - site.share) ** many if site.share < 1 else 1.0
        tokens = many * site.share / used
        parts = parts_at(kind, site.shape, rank)
        if site.form == "embedding":  # a lookup, and the second factor behind it
            width = site.shape[0] if rank is None else rank
            lookup = Kernel("lookup", "embedding", 0, 2 * tokens * width * self.device.itemsize)
            products = parts.products[1:] if rank is not None else ()
            kernels = [lookup, *kernels_of(dataclasses.replace(parts, products=products), tokens, self.device)]
        else:
            kernels = kernels_of(parts, tokens, self.device)
        return used * sum(kernel.seconds(self.device) for kernel in kernels)

    def nanoseconds(self, site: Site, kind: str, rank: int | None) -> int:
        """The same in whole nanoseconds, rounded up: sums of them never promise too little."""
        return max(math.ceil(1e9 * self.seconds(site, kind, rank)), 1)

    def limit(self, sites: Sequence[Site], share: float) -> int:
        """Nanoseconds allowed over all sites: a share of their time when dense, rounded down."""
        dense = sum(self.nanoseconds(site, "dense", None) for site in sites)
        return math.floor(Fraction(str(share)) * dense)

    def priced(self, curve: Curve, site: Site, kind: str) -> Curve:
        """The curve of a site with its costs in nanoseconds.

        A rank that is not faster than the dense matrix costs no less than it, and no allocator takes such a rank.
        """
        cost = [self.nanoseconds(site, kind, rank) for rank in curve.ranks.tolist()]
        return curve.priced(cost, self.nanoseconds(site, "dense", None))

    def require(self, curves: Sequence[Curve], limit: int, multiple_of: int) -> None:
        """Refuse a budget that no choice of ranks meets.

        Raises:
            CorankError: naming the shortest time there is.
        """
        least = sum(int(options_of(curve, multiple_of).cost[0]) for curve in curves)
        dense = sum(curve.dense_cost for curve in curves)
        if least > limit:
            stuck = sum(len(options_of(curve, multiple_of).cost) == 1 for curve in curves)
            raise CorankError(
                f"No choice of ranks takes {limit / dense:.0%} of the dense time ({self.describe()}); the shortest is "
                f"{least / dense:.0%}, as {stuck} of the {len(curves)} matrices are too small to be faster in factors: allow "
                "more time, ask for a larger latency_batch or latency_tokens, or give keep=... if it is memory you want."
            )

    def describe(self) -> str:
        """In words, e.g. ``decode, batch 1, NVIDIA H200, bfloat16``."""
        step = "decode" if self.tokens == 1 else f"prefill of {self.tokens} tokens"
        return f"{step}, batch {self.batch}, {self.device.name}, {self.device.dtype}"
