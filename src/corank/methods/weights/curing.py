"""CURing: columns and rows in place of singular vectors (Park & Moon 2025, arXiv:2501.04211).

    a = RMS of the inputs;  S = |W| diag(a) = P Sigma V^T;  I = DEIM(P_r), J = DEIM(V_r);  C = W[:, J], R = W[I];
    M = C^+ W R^+;  W' = C M R.  Layers: the N that turn their hidden state least (angular distance), never the first or last.
    Rank: min(r_max, largest r with r (m + n) + r^2 < m n).

Needs: RMS of the inputs and the angle between each layer's input and output. Stores: C, M, R; only M trains.
`curing` is the paper's program, `curing-v2` its later rewrite. The reference selection loop is not textbook DEIM and chooses
worse; it is kept as selector "curing-v1" (and "curing-v2"), the default here is the textbook's.
"""

from __future__ import annotations

import math

import torch

from corank.errors import CorankError
from corank.factorize import CURDecomposition, Geometry, Measured
from corank.model import Site, sites_with_roles
from corank.recipe import RankChoice, Recipe, register


def break_even(m: int, n: int) -> int:
    """Largest r at which C, M, R are not larger than W: r (m + n) + r^2 <= m n."""
    return math.floor((math.sqrt(m * m + 6 * m * n + n * n) - (m + n)) / 2)


def least_turning(distances: list[float]) -> list[int]:
    """Layers by increasing angular distance, without the first and the last."""
    return sorted(range(1, len(distances) - 1), key=lambda layer: distances[layer])


def spend(case: RankChoice, layers: int, rank_of: dict[str, int], order: list[int]) -> dict[str, int]:
    """Ranks of the first N layers in `order`: N = `layers` without a budget, else as few as meet it.

    If even all layers do not, their ranks are lowered together.

    Raises:
        CorankError: rank 1 everywhere is still too large; the smallest possible size is named.
    """
    sites = {site.name: site for site in case.sites}

    def total(chosen: dict[str, int]) -> int:
        return case.dense - sum(sites[n].numel - case.cost(sites[n], r) for n, r in chosen.items())

    def first(count: int) -> dict[str, int]:
        return {n: r for n, r in rank_of.items() if sites[n].layer in order[:count]}

    if case.limit is None:
        return first(layers)
    for count in range(len(order) + 1):
        if total(first(count)) <= case.limit:
            return first(count)
    everywhere = first(len(order))
    low, high = 0, 1000  # the common factor of the ranks, in thousandths
    if total({n: 1 for n in everywhere}) > case.limit:
        smallest = total({n: 1 for n in everywhere}) / case.dense
        raise CorankError(
            f"CURing compresses some matrices of some layers, here to no less than {smallest:.3f} of the sites' parameters; "
            "choose a larger budget, more roles (--targets), or another method."
        )
    while low < high:  # the largest factor that fits
        middle = (low + high + 1) // 2
        if total({n: max(1, r * middle // 1000) for n, r in everywhere.items()}) <= case.limit:
            low = middle
        else:
            high = middle - 1
    return {n: max(1, r * low // 1000) for n, r in everywhere.items()}


def _geometry(measured: Measured) -> Geometry:
    return Geometry(measured.diagonal(measured.moments.rms.square()))


ROLES = ("q", "k", "gate")


@register("curing", family="weights", cite="arXiv:2501.04211")
def curing(layers: int = 10, rank: int | None = None, selector: str = "deim", roles: tuple[str, ...] = ROLES) -> Recipe:
    """CUR of q, k and gate in the layers that matter least (the paper's program).

    Args:
        layers: N, how many layers, if no budget is given; with a budget, as few as meet it.
        rank: r_max; None: a sixteenth of the input width (256 for a width of 4096, the paper's).
        selector: "deim" (textbook), or "curing-v1" for the reference code's loop; any other selector works.
        roles: which matrices.
    """

    def rule(case: RankChoice) -> dict[str, int]:
        ranks = {
            s.name: min(rank if rank is not None else max(s.shape[1] // 16, 1), break_even(*s.shape))
            for s in sites_with_roles(case.sites, roles)
        }
        return spend(case, layers, ranks, least_turning(case.distances))

    return Recipe(
        statistics=("moments", "angular"), geometry=_geometry, factorize=CURDecomposition(selector), rule=rule
    )


@register("curing-v2", family="weights", cite="arXiv:2501.04211 (rewrite of 2025-10)")
def curing_v2(
    layers: int = 10,
    energy: float = 0.88,
    min_rank: int | None = None,
    max_rank: int | None = None,
    multiple: int = 128,
    selector: str = "deim",
    roles: tuple[str, ...] = ROLES,
) -> Recipe:
    """CURing with a signed importance, the weighted optimal link and ranks by energy (the later program).

    Args:
        layers: N, how many layers, if no budget is given; with a budget, as few as meet it.
        energy: share of the squared singular values of W D that the rank must hold.
        min_rank: lower bound of the rank; None: a quarter of the input width (1024 for a width of 4096).
        max_rank: upper bound of the rank, None for none.
        multiple: ranks are rounded up to this (down at the break-even rank); 1 where that is not possible.
        selector: "deim" (textbook), or "curing-v2" for the reference code's loop; any other selector works.
        roles: which matrices.
    """

    def by_energy(case: RankChoice, site: Site) -> int:
        W, measured = case.load(site)
        sigma2 = torch.linalg.svdvals(_geometry(measured).right.weigh_columns(W.double())).square()
        share = sigma2.cumsum(0) / sigma2.sum().clamp_min(torch.finfo(sigma2.dtype).tiny)
        r = int((share < energy).sum()) + 1
        top = break_even(*site.shape)
        step = multiple if top >= multiple else 1
        top = top // step * step
        r = min(math.ceil(r / step) * step, top)
        lowest = min_rank if min_rank is not None else site.shape[1] // 4
        return max(min(max(r, lowest), top, max_rank or top), 1)

    def rule(case: RankChoice) -> dict[str, int]:
        ranks = {s.name: by_energy(case, s) for s in sites_with_roles(case.sites, roles)}
        return spend(case, layers, ranks, least_turning(case.distances))

    factorize = CURDecomposition(selector, importance="signed", weighted=True, svd="randomized")
    return Recipe(statistics=("moments", "angular"), geometry=_geometry, factorize=factorize, rule=rule)
