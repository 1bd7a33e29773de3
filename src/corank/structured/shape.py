"""The widths of blocks: what a narrowed model looks like, counted in one place.

Who calls whom. `corank.structured.driver` streams the blocks of the model in order. If the recipe has `units`, it

1. visits all blocks once for what the shares of the blocks depend on: what each changes (allocate=entropic), or the
   scores of its units (where ``widths.needs_scores(recipe, blocks, limit)`` says so), from
   ``narrow.scores(block: Block) -> dict[unit, Tensor]``, one number per channel [channels] and per key-value head
   [kv_heads], comparable between blocks if allocate=z-score;
2. asks ``widths.widths(recipe, widths.Blocks(shapes, sites, units, protected), limit, influence=, scores=)`` for the
   widths that every block is to get, within the budget; the units are those of ``units.find_units(module,
   sites, prefix, config)``, which also says what was skipped and why;
3. visits the blocks again and calls ``narrow.narrow(block: Block, target: BlockShape) -> Narrowed`` for every one that
   stays, which changes ``block.module`` in place. It must reach `target` exactly (or the budget would not hold).
   What it says about losses goes into the report. The driver then writes the block under its NEW number.

`Block` and `Narrowed` are in `corank.structured.block`. The sizes of matrices follow from the widths by `matrix_after`,
and the attributes of attention modules by `set_attributes`, for slicing and for loading alike: whoever slices the
linear layers of a block calls ``set_attributes(block.module, block.config, before, after)`` afterwards.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from corank.errors import CorankError
from corank.factors import is_conv1d, shape_of
from corank.model.site import Site


@dataclass(frozen=True)
class BlockShape:
    """The widths of one block.

    Attributes:
        channels: hidden width of the feed-forward network.
        heads: query heads; a multiple of `kv_heads`.
        kv_heads: key-value heads.
        head_dim: dimensions of a head, the same for queries, keys and values.
        biases: paths inside the block of matrices that have got a bias which the source has not.
        pairs: dimensions, by two, of each head of queries and keys that are left: pair i is dimensions i and i + h / 2 of
            the source, which rotary embeddings turn together; empty if all are. The same in all blocks.
        ranks: path inside the block and rank of every matrix that is stored as two factors.
    """

    channels: int
    heads: int
    kv_heads: int
    head_dim: int
    biases: tuple[str, ...] = ()
    pairs: tuple[int, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        said = {**asdict(self), "biases": list(self.biases), "pairs": list(self.pairs), "ranks": dict(self.ranks)}
        return said if self.ranks else {name: value for name, value in said.items() if name != "ranks"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockShape:
        """The inverse of `to_dict`.

        Raises:
            CorankError: a width is missing or not positive.
        """
        try:
            values = {f.name: int(data[f.name]) for f in fields(cls) if f.name not in ("biases", "pairs", "ranks")}
            ranks = tuple((str(path), int(rank)) for path, rank in dict(data.get("ranks", {})).items())
            shape = cls(**values, biases=tuple(data.get("biases", ())), pairs=tuple(data.get("pairs", ())), ranks=ranks)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise CorankError(f"config.json holds widths of a block that cannot be read ({error!r}).") from None
        if min(values.values()) < 1 or shape.heads % shape.kv_heads:
            raise CorankError(f"config.json holds widths that no block can have: {dict(data)}.")
        return shape


@dataclass(frozen=True)
class Shape:
    """What becomes of the blocks of a model.

    Attributes:
        kept: numbers of the source's blocks that stay, in order; their new numbers are their places in it.
        blocks: the widths of each of them, empty if no block is narrowed.
    """

    kept: tuple[int, ...]
    blocks: tuple[BlockShape, ...] = ()

    @property
    def same(self) -> bool:
        """Whether all blocks have the same widths."""
        return len(set(self.blocks)) <= 1

    def number(self, layer: int) -> int | None:
        """New number of a block of the source, None if it goes."""
        return self.kept.index(layer) if layer in self.kept else None


#: role of a matrix -> (rows, columns) in widths; None for what stays as it is
_SIZES: dict[str, tuple[str | None, str | None]] = {
    "q": ("query", None),
    "k": ("key", None),
    "v": ("key", None),
    "qkv": ("fused", None),
    "o": (None, "query"),
    "gate": ("channels", None),
    "up": ("channels", None),
    "gate_up": ("gated", None),
    "down": (None, "channels"),
}


def _width(kind: str, shape: BlockShape) -> int:
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"query": query, "key": key, "fused": query + 2 * key, "channels": shape.channels}
    return {**sizes, "gated": 2 * shape.channels}[kind]


def matrix_after(site: Site, before: BlockShape, after: BlockShape) -> tuple[int, int]:
    """(out, in) of a matrix of a block that had the widths `before` and gets those of `after`.

    A matrix whose size does not follow from the widths (a router, an expert's of another width) stays as it is.
    """
    return tuple(  # type: ignore[return-value]
        _width(kind, after) if kind is not None and _width(kind, before) == size else size
        for kind, size in zip(_SIZES.get(site.role, (None, None)), site.shape, strict=True)
    )


def places_after(site: Site, before: BlockShape, after: BlockShape) -> tuple[list[int], list[int]]:
    """Rows and columns of a matrix of a wider block, where the units of a narrower one are the first of their kind.

    Args:
        site: the matrix of the wider block.
        before: widths of the narrower block.
        after: widths of the wider one.
    """
    sides = zip(_SIZES.get(site.role, (None, None)), site.shape, strict=True)
    rows, columns = (_places(kind, size, before, after) for kind, size in sides)
    return rows, columns


def _places(kind: str | None, size: int, before: BlockShape, after: BlockShape) -> list[int]:
    if kind is None or _width(kind, after) != size:
        return list(range(size))
    parts = {"gated": ("channels", "channels"), "fused": ("query", "key", "key")}.get(kind, (kind,))
    starts = itertools.accumulate((_width(part, after) for part in parts), initial=0)
    return [start + i for part, start in zip(parts, starts, strict=False) for i in range(_width(part, before))]


def bound_to(site: Site, before: BlockShape, width: str) -> bool:
    """Whether a matrix has a side that is the given width: "channels" or "heads"."""
    kinds = ("channels", "gated") if width == "channels" else ("query", "key", "fused")
    sides = zip(_SIZES.get(site.role, (None, None)), site.shape, strict=True)
    return any(kind in kinds and _width(kind, before) == size for kind, size in sides if kind is not None)


def rank_after(site: Site, after: BlockShape) -> int | None:
    """Rank of a matrix that is stored as two factors, None if it is not."""
    return next((rank for path, rank in after.ranks if site.name.endswith(f".{path}")), None)


def parameters(sites: Sequence[Site], before: BlockShape, after: BlockShape) -> int:
    """Parameters of the matrices of a block after narrowing; a bias counts where the source has none.

    Args:
        sites: the matrices of the block; biases are recognised by the end of the site's name.
    """
    total = 0
    for site in sites:
        m, n = matrix_after(site, before, after)
        rank = rank_after(site, after)
        total += m * n if rank is None else rank * (m + n)
        total += m if any(site.name.endswith(f".{path}") for path in after.biases) else 0
    return total


def shape_of_block(config: PretrainedConfig, sites: Sequence[Site]) -> BlockShape:
    """Widths of a block, from the configuration and the sizes of its matrices.

    Args:
        config: of the model; that of its text if it has several parts.
        sites: the matrices of the block.

    Raises:
        CorankError: the block has no feed-forward network or no attention whose widths could be found.
    """
    text = config.get_text_config()
    by_role = {s.role: s for s in reversed(sites)}
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    out, down = by_role.get("o"), by_role.get("down")
    if not heads or out is None or down is None:
        lacks = "attention heads" if not heads else "an attention output" if out is None else "a down-projection"
        raise CorankError(
            f"The blocks of {type(config).__name__.removesuffix('Config')} have no part that is recognised as {lacks}, "
            "so they cannot be narrowed; take whole blocks away (shortgpt, sleb) or factorize (svd-llm)."
        )
    head_dim = out.shape[1] // heads
    key, fused = by_role.get("k"), by_role.get("qkv")
    rows = key.shape[0] if key else (fused.shape[0] - heads * head_dim) // 2 if fused else heads * head_dim
    return BlockShape(down.shape[1], heads, max(rows // head_dim, 1), head_dim)


#: attributes in which modules of a block keep its widths, with what they are
_ATTRIBUTES = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "n_head": "heads",
    "n_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_kv_heads": "kv_heads",
    "num_key_value_groups": "groups",
    "intermediate_size": "channels",
    "ffn_dim": "channels",
    "all_head_size": "query",
    "split_size": "query",
    "inner_dim": "query",
}


def _named(shape: BlockShape) -> dict[str, int]:
    return {
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "groups": shape.heads // shape.kv_heads,
        "channels": shape.channels,
        "query": shape.heads * shape.head_dim,
    }


def set_attributes(module: nn.Module, config: PretrainedConfig, before: BlockShape, after: BlockShape) -> None:
    """Tell the modules of a block its new widths, where they have stored them.

    A module of which a fused matrix is part asks the configuration in its forward; it gets one of its own.
    """
    old, new = _named(before), _named(after)
    for part in module.modules():
        for attribute, meaning in _ATTRIBUTES.items():
            if part.__dict__.get(attribute) == old[meaning]:
                setattr(part, attribute, new[meaning])
        fused = any(name in ("qkv_proj", "query_key_value") for name, _ in part.named_children())
        if fused and part.__dict__.get("config") is not None and after != before:
            config_of_part: Any = part.config
            part.config = narrowed_config(config_of_part, after)  # type: ignore[assignment]


#: names under which configurations keep a width, in the order of preference
CONFIG_NAMES: dict[str, tuple[str, ...]] = {
    "channels": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
}


def narrowed_config(config: PretrainedConfig, after: BlockShape) -> PretrainedConfig:
    """A copy of a configuration with other widths; nothing is validated."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for width, names in CONFIG_NAMES.items():
        name = next((n for n in names if hasattr(text, n)), names[0])
        if hasattr(text, name) or width == "head_dim":
            setattr(text, name, getattr(after, width))
    return made


def narrow_empty(module: nn.Module, sites: Sequence[Site], prefix: str, before: BlockShape, after: BlockShape) -> None:
    """Give the linear layers of a block the sizes of other widths, without values (before weights are loaded).

    Args:
        module: the block.
        sites: its matrices.
        prefix: path of the block, with a dot at the end.
        before, after: its widths.
    """
    for site in sites:
        path = site.name.removeprefix(prefix)
        old: Any = module.get_submodule(path)
        m, n = matrix_after(site, before, after)
        bias = old.bias is not None or path in after.biases
        if (m, n) != shape_of(old) or bias != (old.bias is not None):
            module.set_submodule(path, empty_linear(old, m, n, bias))


def empty_linear(old: nn.Module, m: int, n: int, bias: bool) -> nn.Module:
    """A layer of the same class as `old`, [m, n], with uninitialised values on its device and in its dtype."""
    weight: Any = old.weight
    if is_conv1d(old):
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            made: nn.Module = Conv1D(m, n)
        return made.to_empty(device=weight.device).to(weight.dtype)
    return nn.Linear(n, m, bias=bias, device=weight.device, dtype=weight.dtype)
