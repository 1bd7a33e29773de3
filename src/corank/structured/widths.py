"""From a budget to the widths of every block."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.model.site import Site
from corank.structured.allocation import Part, by_shares, entropic, logarithmic, pooled
from corank.structured.attention import matrices, split
from corank.structured.recipe import Structured
from corank.structured.shape import BlockShape, bound_to, parameters
from corank.structured.units import CHANNELS, HEADS, PAIRS, Units

ENOUGH = 1 / 2
"""Heads keep their dimensions as long as the feed-forward networks give up no more than this share of their channels."""


@dataclass(frozen=True)
class Blocks:
    """The blocks that stay, and what can be narrowed in each.

    Attributes:
        shapes: their widths.
        sites: the matrices of each.
        units: those of `corank.structured.units.find_units` for each.
        protected: places in these lists of blocks that keep their widths.
    """

    shapes: Sequence[BlockShape]
    sites: Sequence[Sequence[Site]]
    units: Sequence[Sequence[Units]]
    protected: Collection[int] = ()

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def dense(self) -> int:
        """Parameters of all matrices."""
        return self.size(self.shapes)

    def size(self, after: Iterable[BlockShape]) -> int:
        """Parameters of all matrices at other widths, biases that these bring included."""
        return sum(parameters(s, b, a) for s, b, a in zip(self.sites, self.shapes, after, strict=True))

    def narrow(self, block: int, kind: str) -> Units | None:
        """The units of a kind in a block if they are all that has their width there, else None."""
        found = [u for u in self.units[block] if u.kind == kind]
        if block in self.protected or len(found) != 1:
            return None
        bound = sum(bound_to(s, self.shapes[block], kind) for s in self.sites[block])
        return found[0] if bound == len({r.path for r in found[0].producers}) + 1 else None

    def part(self, recipe: Structured, block: int, kind: str) -> Part | None:
        """What removing units of a kind would free in a block."""
        units, before = self.narrow(block, kind), self.shapes[block]
        if units is None or units.count < 2:
            return None
        after = _with(before, kind, units.count - 1)
        sites = self.sites[block]
        cost = parameters(sites, before, before) - parameters(sites, before, after)
        return Part(block, kind, units.count, cost, step=recipe.multiple_of if kind == CHANNELS else 1)


def _with(shape: BlockShape, kind: str, count: int) -> BlockShape:
    if kind == CHANNELS:
        return dataclasses.replace(shape, channels=count)
    return dataclasses.replace(shape, heads=count * (shape.heads // shape.kv_heads), kv_heads=count)


def widths(
    recipe: Structured,
    blocks: Blocks,
    limit: int,
    *,
    influence: Sequence[float] | None = None,
    scores: Sequence[Mapping[str, Tensor]] | None = None,
) -> list[BlockShape]:
    """The widths that every block is to get.

    Args:
        recipe: says which units go, and how the budget is shared.
        blocks: those that stay.
        limit: parameters that all their matrices may have, biases that are added included.
        influence: what each block changes, for allocate=entropic.
        scores: of the units of every block (`corank.structured.narrow.scores`), where `needs_scores` says so.

    Raises:
        CorankError: nothing can be narrowed, or the budget would empty a feed-forward network or an attention.
    """
    if limit >= blocks.dense:
        return list(blocks.shapes)
    shapes = list(blocks.shapes)
    head_dim = head_dimensions(recipe, blocks, limit)
    if head_dim is not None:
        assert scores is not None, "pairs are chosen by scores of all blocks"
        pairs = _best_pairs([s[PAIRS] for s in scores], head_dim // 2)
        shapes = [dataclasses.replace(s, head_dim=head_dim, pairs=pairs) for s in shapes]
    parts = parts_of(recipe, blocks)
    if recipe.split is not None:
        shapes = _with_ranks(recipe.split, blocks, shapes, limit, sum(p.total for p in parts))
    if not parts and shapes == list(blocks.shapes):
        raise CorankError(
            f"None of the units {', '.join(recipe.units)} can be taken out of these blocks; take whole blocks away "
            "(shortgpt, sleb) or factorize (svd-llm)."
        )
    biased = [
        _biased(recipe, blocks, i, shape, [p.kind for p in parts if p.block == i]) for i, shape in enumerate(shapes)
    ]
    room = limit - blocks.size(biased) + sum(p.total for p in parts)
    if room < 0 and not parts:
        raise CorankError(
            f"The budget leaves {max(limit, 0):,} parameters to blocks that have {blocks.size(biased):,} without anything that "
            "could still go; raise it."
        )
    counts = _counts(recipe, blocks, parts, room, influence, scores)
    for part, k in zip(parts, counts, strict=True):
        shapes[part.block] = _with(shapes[part.block], part.kind, k)
    narrowed = [
        [p.kind for p, k in zip(parts, counts, strict=True) if p.block == i and k < p.count] for i in range(len(blocks))
    ]
    return [_biased(recipe, blocks, i, shape, narrowed[i]) for i, shape in enumerate(shapes)]


def _with_ranks(
    alpha: float, blocks: Blocks, shapes: Sequence[BlockShape], limit: int, channels: int
) -> list[BlockShape]:
    """The same with attention as factors, which keeps the same share of its parameters as the rest that can be narrowed.

    Args:
        alpha: see `corank.structured.attention.split`.
        limit: parameters that all matrices may have.
        channels: parameters that narrower feed-forward networks could free.
    """
    found = [{} if i in blocks.protected else matrices(sites) for i, sites in enumerate(blocks.sites)]
    whole = sum(site.numel for each in found for site in each.values())
    if not whole:
        return list(shapes)
    share = max(1 - (blocks.dense - limit) / (whole + channels), 0.0)
    made: list[BlockShape] = []
    for shape, each in zip(shapes, found, strict=True):
        ranks = split(each, share * sum(s.numel for s in each.values()), alpha) if each else {}
        inside = [(s.name.partition(f".{s.layer}.")[2], ranks[s.name]) for s in each.values() if s.name in ranks]
        made.append(dataclasses.replace(shape, ranks=tuple(sorted(inside))))
    return made


def parts_of(recipe: Structured, blocks: Blocks) -> list[Part]:
    """What the recipe may take units from."""
    kinds = [kind for kind in (HEADS, CHANNELS) if kind in recipe.units]
    found = [blocks.part(recipe, i, kind) for i in range(len(blocks)) for kind in kinds]
    return [part for part in found if part is not None]


def needs_scores(recipe: Structured, blocks: Blocks, limit: int) -> bool:
    """Whether the widths depend on scores of the units of all blocks."""
    if limit >= blocks.dense:
        return False
    return recipe.allocate == "z-score" or head_dimensions(recipe, blocks, limit) is not None


def head_dimensions(recipe: Structured, blocks: Blocks, limit: int) -> int | None:
    """Dimensions that all heads of all blocks get, None if they keep theirs.

    They do if the feed-forward networks alone can give up enough, if dimensions cannot go everywhere alike, or if blocks
    are fitted to what narrowed blocks make: heads of another size can be run only once all of them are.
    """
    possible = {"qk", "vo"} <= set(recipe.units) and HEADS not in recipe.units and not recipe.sequential
    alike = not blocks.protected and len({s.head_dim for s in blocks.shapes}) == 1
    if not (possible and alike and all(any(u.kind == PAIRS for u in units) for units in blocks.units)):
        return None
    remove = blocks.dense - limit
    channels = sum(p.total for p in parts_of(recipe, blocks))
    if channels and remove <= ENOUGH * channels:
        return None
    h = blocks.shapes[0].head_dim
    attention = blocks.dense - blocks.size([dataclasses.replace(s, head_dim=0) for s in blocks.shapes])
    step = 8 if h >= 32 else 2
    exact = h * (1 - remove / (attention + channels)) if channels else h * (1 - remove / attention) // step * step
    return max(min(round(exact / step) * step, h - step), step) if h > step else None


def _best_pairs(scores: Sequence[Tensor], count: int) -> tuple[int, ...]:
    """The rotary pairs that matter most over all blocks, each of which counts as much as any other."""
    total = sum(
        (s.double() / s.double().sum().clamp_min(torch.finfo(torch.float64).tiny) for s in scores), torch.zeros(())
    )
    assert isinstance(total, Tensor)
    return tuple(total.topk(count).indices.sort().values.tolist())


def _biased(recipe: Structured, blocks: Blocks, block: int, shape: BlockShape, kinds: Iterable[str]) -> BlockShape:
    """The same with the biases that compensation gives to the consumers of narrowed units, where they have none."""
    if recipe.compensate not in ("bias", "affine-ls"):
        return shape
    without = {s.name for s in blocks.sites[block] if not s.bias}
    added = [u.consumer for u in blocks.units[block] if u.kind in set(kinds) and u.name in without]
    return dataclasses.replace(shape, biases=(*shape.biases, *(p for p in added if p not in shape.biases)))


def _counts(
    recipe: Structured,
    blocks: Blocks,
    parts: Sequence[Part],
    room: int,
    influence: Sequence[float] | None,
    scores: Sequence[Mapping[str, Tensor]] | None,
) -> list[int]:
    if not parts:
        return []
    if recipe.allocate == "z-score":
        assert scores is not None, "one list of all units needs their scores"
        return pooled(parts, [scores[p.block][p.kind] for p in parts], room)
    if recipe.uniform:
        return _alike(parts, len(blocks), room)
    weights = [1.0] * len(blocks)
    if recipe.allocate == "entropic":
        assert influence is not None, "what the blocks change decides"
        weights = entropic(influence, recipe.temperature)
    elif recipe.allocate == "log":
        weights = logarithmic(len(blocks))
    cap = recipe.cap if recipe.allocate in ("entropic", "log") else 1.0
    return by_shares(parts, [weights[p.block] for p in parts], room, cap)


def _alike(parts: Sequence[Part], blocks: int, room: int) -> list[int]:
    """One width of each kind for all blocks: the parts of a kind are one part."""
    together: dict[str, Part] = {}
    for kind in dict.fromkeys(p.kind for p in parts):
        mine = [p for p in parts if p.kind == kind]
        if len(mine) != blocks or len({(p.count, p.step) for p in mine}) != 1:
            raise CorankError(
                f"uniform=true needs {kind} that can be narrowed in all {blocks} blocks, and as many in each; "
                f"here they can in {len(mine)}. Leave uniform out."
            )
        together[kind] = dataclasses.replace(mine[0], cost=sum(p.cost for p in mine))
    whole = list(together.values())
    counts = dict(zip(together, by_shares(whole, [1.0] * len(whole), room, 1.0), strict=True))
    return [counts[p.kind] for p in parts]
