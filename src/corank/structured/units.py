"""What can be taken out of a block: the hidden vectors between its matrices, and the units they consist of.

A hidden vector lies between producers, whose rows make it, and one consumer, whose columns read it. In a feed-forward
part its units are channels; in an attention part a unit is a key-value head with all query heads that read it, or a
dimension of all heads. They are found by structure: by the roles of matrices, by which of them read one input, by shapes
that fit, and by the absence of anything else that looks at the whole vector. What does not fit is left alone, with the
reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from corank.factors import is_conv1d
from corank.model.site import Site

CHANNELS, HEADS, PAIRS = "channels", "heads", "pairs"

ROTATIONS = ("default", "linear", "llama3")
"""Kinds of rotary embeddings whose frequencies are the same at every length, so that any of them can be left out."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of a producer are: unit u has rows ``start + u * size`` to ``start + (u + 1) * size``."""

    path: str
    start: int
    size: int


@dataclass(frozen=True)
class Units:
    """The units of one hidden vector.

    Attributes:
        name: path of the consumer in the model, which names the hidden vector.
        kind: "channels"; "heads", key-value heads; or "pairs", dimensions of all heads as rotary embeddings turn them.
        count: units, n.
        size: columns of the consumer per unit: 1, or g * h for g query heads of h dimensions.
        producers: rows that make the vector; for heads those of q, k and v, in this order.
        consumer: path of the consumer inside its block.
        inside: path, inside the block, of the module that holds them all.
        heads: (g, h), (1, 1) for channels.
    """

    name: str
    kind: str
    count: int
    size: int
    producers: tuple[Rows, ...]
    consumer: str
    inside: str
    heads: tuple[int, int] = (1, 1)

    @property
    def first(self) -> str:
        """Path of a producer inside the block; all of them read the same input."""
        return self.producers[0].path


@dataclass(frozen=True)
class Skipped:
    """Units of a kind that have to stay as they are, named by their consumer, and why."""

    name: str
    kind: str
    reason: str


def find_units(
    module: nn.Module, sites: Sequence[Site], prefix: str, config: PretrainedConfig
) -> tuple[list[Units], list[Skipped]]:
    """Units of a block, in the order in which it runs, and what was left alone.

    Args:
        module: the block, with or without weights.
        sites: its matrices, in the order in which it runs them.
        prefix: its path with a dot at the end.
        config: of the model.
    """
    found: list[Units] = []
    skipped: list[Skipped] = []
    finder = _Finder(module, [s for s in sites if s.form == "linear"], prefix)
    for i, site in enumerate(finder.sites):
        kind = {"down": CHANNELS, "o": HEADS}.get(site.role)
        if kind is None:
            continue
        result = finder.channels(i) if kind == CHANNELS else finder.heads(i)
        if isinstance(result, str):
            skipped.append(Skipped(site.name, kind, result))
            continue
        found.append(result)
        if kind == HEADS:
            reason = _turns_otherwise(module.get_submodule(result.inside), config, result)
            if reason:
                skipped.append(Skipped(site.name, PAIRS, reason))
            else:
                found.append(replace(result, kind=PAIRS, count=result.heads[1] // 2))
    return found, skipped


def sentences(skipped: Sequence[Skipped], kinds: Iterable[str]) -> list[str]:
    """What is said of units that a recipe would take out but cannot, one sentence for each reason.

    Args:
        skipped: of all blocks.
        kinds: that the recipe takes out.
    """
    wanted = {PAIRS if kind in ("qk", "vo") else kind for kind in kinds}
    names: dict[tuple[str, str], list[str]] = {}
    for each in skipped:
        if each.kind in wanted or (each.kind == HEADS and PAIRS in wanted):
            names.setdefault((NAMES[each.kind], each.reason), []).append(each.name)
    return [
        f"{what} before {where[0]}{f' and {len(where) - 1} more' * (len(where) > 1)} stay as they are: {reason}."
        for (what, reason), where in names.items()
    ]


NAMES = {CHANNELS: "The channels", HEADS: "The heads", PAIRS: "The dimensions of the heads"}


class _Finder:
    def __init__(self, module: nn.Module, sites: list[Site], prefix: str):
        self.module, self.sites, self.prefix = module, sites, prefix

    def path(self, site: Site) -> str:
        return site.name.removeprefix(self.prefix)

    def channels(self, i: int) -> Units | str:
        """Channels of the feed-forward part that ends in a site, or the reason why they cannot be taken out."""
        down = self.sites[i]
        if down.pool is not None:
            return "the experts of a layer have to keep one width"
        made = self.before(i, ("gate", "up", "gate_up"))
        width = down.shape[1]
        if not made:
            return "no gate or up projection comes before it"
        halves = 2 if made[0].role == "gate_up" else 1
        if any(s.shape[0] != width * halves for s in made) or (halves == 2 and len(made) > 1):
            return f"the {', '.join(s.role for s in made)} projections before it do not make its {width} inputs"
        inside = _common(self.path(s) for s in (*made, down))
        wrong = self.not_plain((*made, down)) or self.looked_at(inside, (*made, down), {width})
        if wrong:
            return wrong
        made = sorted(made, key=lambda s: s.role == "up")  # in which the vector is linear
        rows = tuple(Rows(self.path(s), half * width, 1) for s in made for half in range(halves))
        return Units(down.name, CHANNELS, width, 1, rows, self.path(down), inside)

    def heads(self, i: int) -> Units | str:
        """Key-value heads of the attention that ends in a site, or the reason why they cannot be taken out."""
        o = self.sites[i]
        made = self.before(i, ("q", "k", "v", "qkv"))
        if any(s.role == "qkv" for s in made):
            return "queries, keys and values are one matrix"
        if sorted(s.role for s in made) != ["k", "q", "v"]:
            return "no q, k and v projections of one input come before it"
        q, k, v = (next(s for s in made if s.role == role) for role in "qkv")
        inside = _common(self.path(s) for s in (q, k, v, o))
        attention: Any = self.module.get_submodule(inside)
        h, g = (getattr(attention, name, None) for name in ("head_dim", "num_key_value_groups"))
        if not isinstance(h, int) or not isinstance(g, int):
            return "its class takes the number of heads from the configuration, not from the matrices"
        n = k.shape[0] // h
        if (q.shape[0], k.shape[0], v.shape[0], o.shape[1]) != (n * g * h, n * h, n * h, n * g * h):
            return f"its matrices do not consist of heads of {h} dimensions, {g} query heads to each key-value head"
        widths = {n, n * g, n * h, n * g * h} - {1, h}
        wrong = self.not_plain((q, k, v, o)) or self.looked_at(inside, (q, k, v, o), widths)
        if wrong:
            return wrong
        rows = tuple(Rows(self.path(s), 0, size) for s, size in ((q, g * h), (k, h), (v, h)))
        return Units(o.name, HEADS, n, g * h, rows, self.path(o), inside, (g, h))

    def before(self, i: int, roles: tuple[str, ...]) -> list[Site]:
        """The last matrices of some roles that run before a site and read one input."""
        made = [s for s in self.sites[:i] if s.role in roles and s.pool is None]
        return [s for s in made if s.group == made[-1].group]

    def not_plain(self, sites: Iterable[Site]) -> str:
        for site in sites:
            layer = self.module.get_submodule(self.path(site))
            if type(layer) is not nn.Linear and not is_conv1d(layer):
                return f"{site.name} is not a plain linear layer"
            if site.tied or site.refusal:
                return f"{site.name} shares its weight with another matrix"
        return ""

    def looked_at(self, inside: str, made: Iterable[Site], widths: set[int]) -> str:
        """Whether anything else there is as wide as the vector: a norm over it, a gate or a sink for each head."""
        matrices = {self.path(s) for s in self.sites}
        home = self.module.get_submodule(inside)
        for name, parameter in home.named_parameters():
            owner = ".".join(filter(None, (inside, name.rpartition(".")[0])))
            if owner not in matrices and widths & set(parameter.shape):
                return f"{owner or name} has a parameter of the same width"
        return ""


def _common(paths: Iterable[str]) -> str:
    """The longest path that all of them are under."""
    parts = [path.split(".")[:-1] for path in paths]
    same = 0
    while all(len(p) > same and p[same] == parts[0][same] for p in parts):
        same += 1
    return ".".join(parts[0][:same])


def _turns_otherwise(attention: nn.Module, config: PretrainedConfig, heads: Units) -> str:
    """Why pairs of dimensions cannot be taken out of all heads, "" if they can.

    They can if pair i is dimensions i and i + h / 2, if it is turned by one frequency at every length, and if nothing
    between the matrices looks at a whole head.
    """
    h = heads.heads[1]
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") not in ROTATIONS:
        return "its heads are not turned by rotary embeddings of one frequency to each pair of dimensions"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or h % 2:
        return "only a part of each head is turned"
    plain = {id(p) for m in attention.modules() if type(m) is nn.Linear for p in m.parameters()}
    if any(h in p.shape for p in attention.parameters() if id(p) not in plain):
        return "its heads are normalised, which looks at all their dimensions"
    rotate = getattr(sys.modules.get(type(attention).__module__), "rotate_half", None)
    if rotate is None or rotate(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        return "pairs of dimensions do not lie half a head apart"
    return ""
