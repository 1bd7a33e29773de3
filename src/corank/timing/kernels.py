"""What a layer launches: its matrix products one by one, with the bytes they move and the operations they do.

The products of a layer are read off the layer itself, whatever its kind: its children `down`, `link` and `up` are the
matrices that it applies one after the other. Their sizes add up to the `flops` and `nbytes` of its factors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from corank.checkpoint.skeleton import empty_layer
from corank.factors import shape_of
from corank.timing.device import Device

PARTS = ("down", "link", "up")
INDEX_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or several alike.

    Attributes:
        name: the matrix, or what it does.
        what: "linear", "attention", "cache", "other", "head" or "embedding".
        flops: operations, 2 per multiply-add.
        nbytes: bytes read and written.
        launches: how often it is launched; less than 1 for an expert that may not be chosen.
        weight_bytes: of `nbytes`, those of weights.
    """

    name: str
    what: str
    flops: float
    nbytes: float
    launches: float = 1
    weight_bytes: float = 0

    def floor(self, device: Device) -> float:
        """Seconds that its bytes and operations take, a launch being free."""
        return device.roofline(self.flops, self.nbytes)

    def seconds(self, device: Device) -> float:
        """launches t0 + max(bytes / bandwidth, flops / peak)."""
        return device.seconds(self.flops, self.nbytes, self.launches)


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix inside a layer, y [T, out] = x [T, inner] W^T.

    Attributes:
        weight: identity of the matrix; several layers may read the same one.
        out, inner: its shape.
        bits: of a stored value; None: those of the device's dtype.
    """

    weight: str
    out: int
    inner: int
    bits: int | None = None

    def weight_bytes(self, device: Device) -> float:
        """Bytes of the matrix."""
        return self.out * self.inner * (device.itemsize if self.bits is None else self.bits / 8)

    def flops(self, tokens: float) -> float:
        """Operations on so many vectors."""
        return 2 * tokens * self.out * self.inner


@dataclasses.dataclass(frozen=True)
class Move:
    """Kernels that only move values: the gathers and the sum of a pivoted layer.

    Attributes:
        launches: their number.
        values: values read and written per token.
        indices: integers read, whatever the number of tokens.
    """

    launches: int = 0
    values: int = 0
    indices: int = 0

    def kernel(self, name: str, tokens: float, device: Device) -> Kernel:
        """As one entry of a list of kernels."""
        nbytes = tokens * self.values * device.itemsize + INDEX_BYTES * self.indices
        return Kernel(f"{name} (move)", "linear", 0, nbytes, self.launches)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a layer is made of.

    Attributes:
        products: in the order in which they are applied.
        move: what it does besides.
    """

    products: tuple[Product, ...]
    move: Move = Move()


def parts_of(layer: Any, name: str) -> Parts:
    """The products of a layer.

    Args:
        layer: factorized (any kind or form), or dense; on any device, the meta device too.
        name: its path, from which its matrices are named.
    """
    if not hasattr(layer, "factors") or layer.kind == "dense":
        return Parts((Product(name, *shape_of(layer)),))
    m, n = shape_of(layer)
    rank = int(layer.rank)
    spec = getattr(layer, "quantized", None) or {}

    def product(part: str, out: int, inner: int, owner: str = name) -> Product:
        return Product(f"{owner}.{part}", out, inner, spec.get(part, {}).get("bits"))

    form = getattr(layer, "form", None)
    if form in ("embedding", "tied"):  # the lookup is counted with the embedding
        return Parts((product("up", m, rank),))
    if layer.kind == "shared":
        return Parts((product("down", rank, n, layer.basis), product("up", m, rank)))
    children = [part for part in PARTS if part in dict(layer.named_children())]
    products = tuple(product(part, *_sizes(getattr(layer, part))) for part in children)
    return Parts(products, _move(layer.kind, m, n, rank))


def _sizes(part: Any) -> tuple[int, int]:
    if hasattr(part, "out_features"):
        return part.out_features, part.in_features
    return shape_of(part)


def _move(kind: str, m: int, n: int, k: int) -> Move:
    """What the layer of a kind does besides products, as `factors` writes it."""
    if kind == "row_pivoted":  # cat of the two parts, then a gather that puts the outputs in order
        return Move(2, 4 * m, m)
    if kind == "column_pivoted":  # two gathers of inputs, then the sum of k values
        return Move(3, 2 * n + 3 * k, n)
    return Move()


@functools.lru_cache(maxsize=65536)
def _empty_parts(kind: str, shape: tuple[int, int], rank: int) -> Parts:
    """Those of a layer called "", which may read a basis of one called "basis"."""
    layer = empty_layer({"kind": kind, "shape": list(shape), "rank": rank, "basis": "basis"}, "meta", torch.float32)
    return parts_of(layer, "")


def parts_at(kind: str, shape: tuple[int, int], rank: int | None) -> Parts:
    """The products of a matrix [m, n] stored as a kind at a rank; rank None: dense."""
    if rank is None or kind == "dense":
        return Parts((Product("", *shape),))
    return _empty_parts(kind, shape, rank)


def parts_from(spec: Mapping[str, Any], name: str) -> Parts:
    """The products of a layer that a checkpoint describes."""
    m, n = spec["shape"]
    if spec.get("form") or spec.get("quantized"):
        plain = {key: value for key, value in spec.items() if key != "quantized"}
        layer = empty_layer(plain, "meta", torch.float32)
        layer.quantized = spec.get("quantized")
        return parts_of(layer, name)
    found = parts_at(spec["kind"], (m, n), int(spec["rank"]))  # models have many layers and few sizes

    def named(product: Product) -> Product:
        owner, _, part = product.weight.rpartition(".")
        owner = name if not owner else str(spec["basis"])
        return dataclasses.replace(product, weight=f"{owner}.{part}" if part else owner)

    return Parts(tuple(named(product) for product in found.products), found.move)


def kernels_of(parts: Parts, tokens: float, device: Device, name: str = "", what: str = "linear") -> list[Kernel]:
    """The kernels of one layer on its own."""
    found = [together([product], tokens, device, product.weight or name, what) for product in parts.products]
    return found + ([parts.move.kernel(name, tokens, device)] if parts.move.launches else [])


def together(
    products: Sequence[Product],
    tokens: float,
    device: Device,
    name: str,
    what: str = "linear",
    *,
    one_input: bool = True,
) -> Kernel:
    """Several products as one kernel; of equal matrices, one.

    Args:
        products: with one input (the first factors of siblings) or with one each (their second factors).
        tokens: vectors that they are applied to.
        device: whose dtype it is.
        name, what: of the kernel.
        one_input: they read the same vectors.
    """
    every = list({product.weight: product for product in products}.values()) if one_input else list(products)
    read = max(p.inner for p in every) if one_input else sum(p.inner for p in every)
    weights = sum(p.weight_bytes(device) for p in every)
    moved = tokens * (read + sum(p.out for p in every)) * device.itemsize
    return Kernel(name, what, sum(p.flops(tokens) for p in every), weights + moved, 1, weights)


def matrix_seconds(
    shape: tuple[int, int], rank: int | None, device: Device, tokens: int = 1, kind: str = "low_rank"
) -> float:
    """Seconds of one matrix on its own.

    Args:
        shape: (m, n) = (out, in).
        rank: None: dense.
        device: where.
        tokens: vectors it is applied to.
        kind: how it is stored.
    """
    return sum(kernel.seconds(device) for kernel in kernels_of(parts_at(kind, shape, rank), tokens, device))
