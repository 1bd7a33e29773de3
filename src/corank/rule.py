"""What a paper's own rank rule may look at, and the rule most of them come down to: a share of each site by its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from corank.errors import CorankError
from corank.factorize import Measured
from corank.model import Site


@dataclass(frozen=True)
class RankChoice:
    """What a paper's own rank rule may look at.

    Attributes:
        sites: the candidates.
        distances: angular distance between the input and the output of every layer ("angular" must be measured).
        limit: parameters allowed over the sites, None without a budget.
        cost: (site, rank) -> stored values.
        load: site -> (W [m, n], its statistics); reads the weights of that block.
    """

    sites: list[Site]
    distances: list[float]
    limit: int | None
    cost: Callable[[Site, int], int]
    load: Callable[[Site], tuple[Tensor, Measured]]

    @property
    def dense(self) -> int:
        """Parameters of all candidates, dense."""
        return sum(site.numel for site in self.sites)

    def proportional(self, weights: Mapping[str, float]) -> dict[str, int]:
        """Ranks by which every site keeps a share of its parameters in proportion to its weight, filling the budget.

        Sites without a weight, and those whose share would be all of it, stay dense (they are left out).

        Args:
            weights: site name -> weight, >= 0.

        Raises:
            CorankError: there is no budget, or rank 1 at all these sites exceeds it (the smallest possible size is named).
        """
        if self.limit is None:
            raise CorankError("This method needs a budget: give one of --keep, --remove, --params or --bytes.")
        sites = [site for site in self.sites if site.name in weights]
        fixed = self.dense - sum(site.numel for site in sites)

        def ranks(scale: float) -> dict[str, int]:
            return {site.name: self._largest(site, scale * weights[site.name]) for site in sites}

        def total(chosen: Mapping[str, int]) -> int:
            return fixed + sum(self._stored(site, chosen[site.name]) for site in sites)

        chosen = ranks(0.0)
        if total(chosen) > self.limit:
            raise CorankError(
                f"With {len(self.sites) - len(sites)} of {len(self.sites)} matrices left dense, this method goes to no less "
                f"than {total(chosen) / self.dense:.3f} of their parameters; choose a larger budget, or compress more layers."
            )
        low, high = 0.0, 1.0 / max(min((w for w in weights.values() if w > 0), default=1.0), 1e-9)
        for _ in range(60):
            middle = (low + high) / 2
            if total(tried := ranks(middle)) <= self.limit:
                low, chosen = middle, tried
            else:
                high = middle
        for site in sorted(sites, key=lambda s: -weights[s.name]):  # what rounding has left
            step = self._stored(site, chosen[site.name] + 1) - self._stored(site, chosen[site.name])
            if weights[site.name] > 0 and total(chosen) + step <= self.limit:
                chosen[site.name] += 1
        return {s.name: chosen[s.name] for s in sites if self._stored(s, chosen[s.name]) < s.numel}

    def _stored(self, site: Site, rank: int) -> int:
        """Values stored at a rank; a form that is not smaller than the dense matrix is the dense matrix."""
        return min(self.cost(site, min(rank, min(site.shape))), site.numel)

    def _largest(self, site: Site, share: float) -> int:
        """The largest rank whose cost is within a share of the parameters, at least 1."""
        low, high = 1, min(site.shape)
        while low < high:
            middle = (low + high + 1) // 2
            if self._stored(site, middle) <= share * site.numel:
                low = middle
            else:
                high = middle - 1
        return low


Rule = Callable[[RankChoice], dict[str, int]]
"""A paper's own rank rule: rank by site name; sites left out stay dense."""
