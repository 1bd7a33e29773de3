"""How a budget is shared among the parts of a model: pure functions of counts, costs and scores.

A share phi_l is removed of part l, with the mean, weighted by what the parts hold, that the budget asks for:

    uniform     phi_l the same
    entropic    max sum s_l (1 - phi_l) + eps sum H(phi_l)  =>  phi ~ softmax(-s / eps), s what a block changes (MoDeGPT,
                arXiv:2408.09632)
    log         phi ~ 1/4 + 3/4 ln(1 + l) / ln(L), later blocks lose more (SlimGPT, arXiv:2412.18110)
    z-score     the units of all blocks in one list, by standardised scores, until the budget is spent (FLAP,
                arXiv:2312.11983)

No share exceeds the cap: what is cut off there the other parts take over in the same proportions. Widths are rounded
down, the rest is handed out again where it fits, and the budget is never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corank.errors import CorankError


@dataclass(frozen=True)
class Part:
    """Units of one kind in one block.

    Attributes:
        block: place of the block in the list.
        kind: "channels" or "heads".
        count: units.
        cost: parameters that go with each.
        least: units that have to stay.
        step: their number is a multiple of this, unless all of them stay.
    """

    block: int
    kind: str
    count: int
    cost: int
    least: int = 1
    step: int = 1

    @property
    def total(self) -> int:
        """Parameters of all units."""
        return self.count * self.cost

    def down(self, exact: float) -> int:
        """The largest width that is not above a number, and not below the least."""
        if exact >= self.count - 1e-9:
            return self.count
        least = min(-(-self.least // self.step) * self.step, self.count)
        return max(math.floor(exact + 1e-9) // self.step * self.step, least)

    def up(self, count: int) -> int:
        """The next larger width."""
        return min((count // self.step + 1) * self.step, self.count)

    def above(self, exact: float) -> int:
        """The smallest width that is not below a number."""
        below = self.down(exact)
        return below if below >= exact - 1e-9 else self.up(below)


def shares(weights: Sequence[float], totals: Sequence[float], remove: float, caps: Sequence[float]) -> list[float]:
    """phi_l = min(cap_l, t w_l) with sum(phi_l total_l) = remove: water filling.

    Args:
        weights: w_l >= 0.
        totals: what each holds.
        remove: sum to remove, over all.
        caps: largest shares.

    Returns:
        shares in [0, cap]; all at their caps if these do not suffice.
    """
    at_cap = [w <= 0 for w in weights]
    phi = [0.0] * len(weights)
    while True:
        free = [i for i, full in enumerate(at_cap) if not full]
        left = remove - sum(phi[i] * totals[i] for i, full in enumerate(at_cap) if full)
        mass = sum(weights[i] * totals[i] for i in free)
        if not free or mass <= 0:
            return phi
        t = max(left, 0.0) / mass
        over = [i for i in free if t * weights[i] > caps[i]]
        if not over:
            for i in free:
                phi[i] = t * weights[i]
            return phi
        for i in over:
            phi[i], at_cap[i] = caps[i], True


def entropic(influence: Sequence[float], temperature: float) -> list[float]:
    """softmax(-s / eps) with eps = temperature times the mean of s.

    Args:
        influence: s_l >= 0, what each block changes.
        temperature: small: all on the block that changes least; large: uniform.
    """
    s = torch.tensor(influence, dtype=torch.float64)
    mean = float(s.mean())
    return torch.softmax(-s / (temperature * mean if mean > 0 else 1.0), 0).tolist()


def logarithmic(layers: int) -> list[float]:
    """1/4 + 3/4 ln(1 + l) / ln(L) for l = 0 ... L - 1."""
    return [0.25 + 0.75 * math.log(1 + l) / math.log(layers) if layers > 1 else 1.0 for l in range(layers)]


def counts_of(parts: Sequence[Part], phi: Sequence[float], limit: int) -> list[int]:
    """Units that stay of every part: the shares rounded down to steps, and what is left of the limit handed out.

    The rest goes to those first that rounding took most from, and to equals alike or not at all.

    Args:
        parts: with `phi`, the share of each to remove.
        limit: parameters that may stay.

    Raises:
        CorankError: the limit is below what has to stay.
    """
    exact = [p.count * (1 - f) for p, f in zip(parts, phi, strict=True)]
    counts = [p.down(x) for p, x in zip(parts, exact, strict=True)]
    spare = limit - size(parts, counts)
    while spare < 0:  # those that may not become narrower have kept more than their share: others give it back
        able = [i for i, p in enumerate(parts) if p.down(counts[i] - 1) < counts[i]]
        if not able:
            raise CorankError(
                f"The budget leaves {max(limit, 0):,} parameters to what can be narrowed, but {size(parts, counts):,} have to "
                "stay so that no feed-forward network and no attention is empty; raise the budget."
            )
        i = max(able, key=lambda i: counts[i] / parts[i].count)
        spare += counts[i] * parts[i].cost
        counts[i] = parts[i].down(counts[i] - 1)
        spare -= counts[i] * parts[i].cost
    lost = {i: round((exact[i] - counts[i]) / p.count, 9) for i, p in enumerate(parts)}
    for amount in sorted({x for x in lost.values() if x > 0}, reverse=True):
        group = [i for i in lost if lost[i] == amount]
        wider = {i: parts[i].up(counts[i]) for i in group}
        cost = sum((wider[i] - counts[i]) * parts[i].cost for i in group)
        if cost <= spare:
            spare -= cost
            counts = [wider.get(i, k) for i, k in enumerate(counts)]
    return counts


def size(parts: Sequence[Part], counts: Sequence[int]) -> int:
    """Parameters of what stays."""
    return sum(k * p.cost for p, k in zip(parts, counts, strict=True))


def pooled(parts: Sequence[Part], scores: Sequence[Tensor], limit: int) -> list[int]:
    """Units that stay if those of all parts are taken in one list, the highest scores first, until the limit is met.

    Args:
        parts: what they cost; each keeps its least.
        scores: [count] of every part, comparable between parts.
        limit: parameters that may stay.

    Raises:
        CorankError: the limit is below what has to stay.
    """
    counts = [p.down(0) for p in parts]
    spare = limit - size(parts, counts)
    if spare < 0:
        return counts_of(parts, [1.0] * len(parts), limit)  # says so
    # a step of several units is worth their mean, so that widths stay multiples
    steps: list[tuple[float, int, int]] = []
    for i, (part, score) in enumerate(zip(parts, scores, strict=True)):
        ranked = score.double().sort(descending=True).values
        k = counts[i]
        while k < part.count:
            wider = part.up(k)
            steps.append((-float(ranked[k:wider].mean()), i, wider))
            k = wider
    closed: set[int] = set()
    for _, i, wider in sorted(steps):
        cost = (wider - counts[i]) * parts[i].cost
        if i in closed or cost > spare:
            closed.add(i)
            continue
        spare, counts[i] = spare - cost, wider
    return counts


def by_shares(parts: Sequence[Part], weights: Sequence[float], limit: int, cap: float) -> list[int]:
    """Units that stay if every part loses a share in proportion to its weight, and none more than the cap.

    Heads, of which there are few and which nothing makes up for, are rounded up first; channels pay for it.

    Args:
        parts: all of them.
        weights: of every part.
        limit: parameters that may stay.
        cap: largest share.

    Raises:
        CorankError: the limit is below what has to stay.
    """
    coarse = [i for i, p in enumerate(parts) if p.kind != "channels"]
    fine = [i for i in range(len(parts)) if i not in coarse]
    totals = [float(p.total) for p in parts]
    remove = sum(totals) - limit
    highest = [min(cap, 1 - p.down(0) / p.count) for p in parts]
    phi = shares(weights, totals, remove, highest)
    if sum(f * t for f, t in zip(phi, totals, strict=True)) < remove * (1 - 1e-9) - 1:
        raise CorankError(
            f"The budget leaves {max(limit, 0) / sum(totals):.0%} of what can be narrowed, less than cap={cap:g} and a unit in "
            "every part allow; keep more, or raise the cap."
        )
    counts = {i: parts[i].above(parts[i].count * (1 - phi[i])) for i in coarse}
    taken = sum(k * parts[i].cost for i, k in counts.items())
    rest = [parts[i] for i in fine]
    if not fine or limit - taken < size(
        rest, [p.down(p.count * (1 - highest[i])) for i, p in zip(fine, rest, strict=True)]
    ):
        return counts_of(parts, phi, limit)
    left = shares(
        [weights[i] for i in fine],
        [totals[i] for i in fine],
        sum(p.total for p in rest) - (limit - taken),
        [highest[i] for i in fine],
    )
    counts |= dict(zip(fine, counts_of(rest, left, limit - taken), strict=True))
    return [counts[i] for i in range(len(parts))]
