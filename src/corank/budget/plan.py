"""The decision: which site becomes what. It can be printed, saved, edited and used again."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from corank.budget.allocators import allocator as find_allocator
from corank.budget.curve import Curve
from corank.errors import CorankError

DENSE = "dense"


@dataclass(frozen=True)
class Choice:
    """What one site becomes.

    Attributes:
        kind: a factor kind, or "dense".
        rank: its rank; min(m, n) when dense.
        basis: the site that stores the basis which this one reads, itself for that one; None: it shares none.
    """

    kind: str
    rank: int
    basis: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise CorankError(f"A rank of {self.rank} is not possible; ranks start at 0.")

    @property
    def is_dense(self) -> bool:
        return self.kind == DENSE


@dataclass(frozen=True)
class Plan:
    """The choice for every site and what it was made from.

    Attributes:
        choices: site -> choice.
        allocator: name of the allocator.
        limit: stored values that were allowed over the sites.
        cost: stored values of the choices.
        predicted_loss: sum of the predicted losses, or None where they are not known.
        widths: for hidden vectors that become narrower, by the name of the matrix that reads them, the units that stay; the
            ranks are those of the matrices that are left.
    """

    choices: dict[str, Choice]
    allocator: str
    limit: int
    cost: int
    predicted_loss: float | None = None
    widths: dict[str, int] = field(default_factory=dict)

    def with_dense(self, shapes: Mapping[str, tuple[int, int]]) -> Plan:
        """The same for all sites that are named, in this order, where those without a choice are dense.

        Args:
            shapes: site -> (m, n).
        """
        dense = {name: Choice(DENSE, min(shape)) for name, shape in shapes.items()}
        return replace(self, choices={name: self.choices.get(name, each) for name, each in dense.items()})

    @classmethod
    def from_ranks(
        cls,
        curves: Sequence[Curve],
        ranks: Mapping[str, int | None],
        *,
        kind: str | Mapping[str, str],
        allocator: str,
        limit: int,
    ) -> Plan:
        """Assemble from an allocator's answer, or from one edited by hand.

        Args:
            curves: one per site, or per group of sites that share a basis.
            ranks: site -> rank, None for dense.
            kind: the factor kind of all sites, or one per site (not asked for in a group: a pair, and those who read its
                basis).
            allocator: name to record.
            limit: stored values allowed.

        Raises:
            CorankError: sites without a rank or ranks without a site, a rank that is not on its curve, or a
                cost above the limit.
        """
        kinds = {curve.site: kind for curve in curves} if isinstance(kind, str) else kind
        sites = {curve.site for curve in curves}
        different = (sites ^ set(ranks)) | (sites - set(kinds))
        if different:
            raise CorankError(f"Curves, ranks and kinds name different sites, among them {min(different)!r}.")
        choices: dict[str, Choice] = {}
        for curve in curves:
            choices |= _choices(curve, ranks[curve.site], str(kinds[curve.site]))
        cost = sum(curve.cost_at(ranks[curve.site]) for curve in curves)
        if cost > limit:
            raise CorankError(f"These ranks cost {cost:,} parameters, more than the limit of {limit:,}.")
        loss = math.fsum(curve.loss_at(ranks[curve.site]) for curve in curves)
        return cls(choices, allocator, limit, cost, loss if math.isfinite(loss) else None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = asdict(self)
        for choice in data["choices"].values():
            if choice["basis"] is None:
                del choice["basis"]
        if not self.widths:
            del data["widths"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            CorankError: if a field is missing or malformed.
        """
        try:
            choices = {
                str(site): Choice(str(choice["kind"]), int(choice["rank"]), choice.get("basis"))
                for site, choice in data["choices"].items()
            }
            loss = data.get("predicted_loss")
            return cls(
                choices,
                str(data["allocator"]),
                int(data["limit"]),
                int(data["cost"]),
                None if loss is None else float(loss),
                {str(name): int(units) for name, units in data.get("widths", {}).items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorankError(f"This is not a plan ({error!r}); write it with Plan.to_json.") from None

    def to_json(self) -> str:
        """A JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
            CorankError: if the text is not JSON, or not a plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise CorankError(f"The plan is not valid JSON ({error}); write it with Plan.to_json.") from None
        return cls.from_dict(data)

    def summary(self) -> str:
        """A few lines for people: the size, and the ranks by kind."""
        share = f" ({self.cost / self.limit:.2%})" if self.limit else ""
        size = f"{self.cost:,} of {self.limit:,} parameters{share}"
        lines = [f"{self.allocator}: {size} over {len(self.choices)} sites"]
        ranks = defaultdict(list)
        for choice in self.choices.values():
            ranks[choice.kind].append(choice.rank)
        for kind in sorted(ranks, key=lambda kind: (kind == DENSE, kind)):
            these = ranks[kind]
            detail = f", rank {min(these)}..{max(these)}, median {median(these):g}" if kind != DENSE else ""
            lines.append(f"  {kind}: {len(these)} sites{detail}")
        if self.predicted_loss is not None:
            lines.append(f"  predicted loss {self.predicted_loss:.6g}")
        return "\n".join(lines)


def _choices(curve: Curve, rank: int | None, kind: str) -> dict[str, Choice]:
    """What a rank of a curve makes of its site, or of all the sites of its group."""
    if not curve.members:
        return {curve.site: Choice(DENSE, min(curve.shape)) if rank is None else Choice(kind, rank)}
    if rank is None:
        return {site: Choice(DENSE, min(shape)) for site, shape in curve.members.items()}
    return {
        site: Choice("low_rank" if site == curve.site else "shared", rank, basis=curve.site) for site in curve.members
    }


def make_plan(
    curves: Sequence[Curve],
    limit: int,
    *,
    kind: str | Mapping[str, str] = "low_rank",
    allocator: str = "lagrange",
    floor: float = 0.0,
    multiple_of: int = 1,
) -> Plan:
    """Allocate by name and assemble the plan.

    Args:
        curves: one per site.
        limit: stored values allowed over the sites, from `Budget.limit`.
        kind: the factor kind the curves were counted with, or one per site.
        allocator: a name in ``ALLOCATORS``.
        floor: no rank below this fraction of the site's uniform rank.
        multiple_of: ranks are multiples of this (full rank and dense excepted).

    Raises:
        CorankError: unknown allocator (with the nearest names), or as the allocator raises.
    """
    ranks = find_allocator(allocator)(curves, limit, floor=floor, multiple_of=multiple_of)
    return Plan.from_ranks(curves, ranks, kind=kind, allocator=allocator, limit=limit)
