"""One basis read by several layers, W'_i = B_i A: k (n + sum m_i) values (arXiv:2410.03765)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.factors.base import FactorizedLinear, Factors, check_shapes, linear, values
from corank.factors.low_rank import LowRank


def count_shared(ms: Iterable[int], n: int, rank: int) -> int:
    """Stored values of a group: k (n + sum m_i), bias excluded."""
    ms = list(ms)
    if not ms:
        return 0
    owner, *followers = ms
    return LowRank.count(owner, n, rank) + sum(SharedLowRank.count(m, n, rank) for m in followers)


@dataclass(frozen=True, eq=False)
class SharedBasis:
    """The factors of a whole group. The first layer owns the basis, the others follow.

    Args:
        basis: A [k, n].
        coefficients: name of the layer -> B_i [m_i, k]; the first name is the owner.

    Raises:
        CorankError: no layer, or a coefficient matrix whose second size is not k.
    """

    basis: Tensor
    coefficients: dict[str, Tensor]

    def __post_init__(self) -> None:
        if not self.coefficients:
            raise CorankError("shared: a basis needs at least one layer.")
        for name, B in self.coefficients.items():
            check_shapes("shared", **{name: (B, (B.shape[0], self.basis.shape[0]))})

    @property
    def owner(self) -> str:
        """The name of the layer that stores the basis."""
        return next(iter(self.coefficients))

    @property
    def rank(self) -> int:
        return self.basis.shape[0]

    @property
    def numel(self) -> int:
        """Stored values of the group."""
        return count_shared((B.shape[0] for B in self.coefficients.values()), self.basis.shape[1], self.rank)

    def split(self) -> dict[str, LowRank | SharedLowRank]:
        """One entry per layer: the owner as `LowRank`, the followers as `SharedLowRank`."""
        parts: dict[str, LowRank | SharedLowRank] = {}
        for name, B in self.coefficients.items():
            owner = name == self.owner
            parts[name] = LowRank(B, self.basis) if owner else SharedLowRank(B, self.basis, self.owner)
        return parts

    def modules(self, biases: Mapping[str, Tensor | None] | None = None) -> dict[str, FactorizedLinear]:
        """The layers of the group, wired to each other.

        Args:
            biases: name -> [m_i] or None; a missing name means no bias.
        """
        biases = biases or {}
        layers: dict[str, FactorizedLinear] = {
            name: part.module(biases.get(name)) for name, part in self.split().items()
        }
        for layer in layers.values():
            if isinstance(layer, SharedLowRankLinear):
                layer.follow(layers[self.owner])
        return layers


@dataclass(frozen=True, eq=False)
class SharedLowRank(Factors):
    """What a follower stores, B, beside the basis it reads.

    Args:
        B: [m, k], stored.
        A: [k, n], stored by the owner: neither `count` nor `nbytes` includes it.
        basis: the name of the owner.
    """

    kind: ClassVar[str] = "shared"
    B: Tensor
    A: Tensor
    basis: str

    def __post_init__(self) -> None:
        check_shapes(self.kind, A=(self.A, (self.B.shape[1], self.A.shape[1])))

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @staticmethod
    def count(m: int, n: int, rank: int) -> int:
        """k m: the basis is counted where it is stored."""
        return rank * m

    @property
    def nbytes(self) -> int:
        return self.B.numel() * self.B.element_size()

    def flops(self, tokens: int) -> int:
        """Both products: each layer applies the basis to its own input."""
        return 2 * tokens * self.rank * sum(self.shape)

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "basis": self.basis}

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def module(self, bias: Tensor | None = None) -> SharedLowRankLinear:
        """The follower, not yet wired: call `follow(owner)` on it before use."""
        return SharedLowRankLinear(self.B, self.A.shape[1], self.basis, bias)


class SharedLowRankLinear(FactorizedLinear):
    """y = up(owner.down(x)): holds `up` = B [out, k] only.

    The owner is kept outside the module tree, so that its `down` is registered, saved and trained once; it is
    looked up through the owner at each call, so that an adapter put on `owner.down` is seen by the followers.
    """

    kind: ClassVar[str] = "shared"

    def __init__(self, B: Tensor, in_features: int, basis: str, bias: Tensor | None = None) -> None:
        super().__init__((B.shape[0], in_features), B.shape[1], like=B)
        self.up = linear(B, bias)
        self.basis = basis
        self._owner: tuple[nn.Module, ...] = ()  # a tuple, because nn.Module would register a bare module

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        (m, n), k = spec["shape"], spec["rank"]
        B = torch.empty(m, k, device=device, dtype=dtype)
        return cls(B, n, spec["basis"], B.new_empty(m) if bias else None)

    def follow(self, owner: nn.Module) -> None:
        """Read the basis from `owner.down`.

        Raises:
            CorankError: the owner has no basis of the right shape.
        """
        down: Any = getattr(owner, "down", None)
        if down is None or (down.out_features, down.in_features) != (self.rank, self.in_features):
            shape = [self.rank, self.in_features]
            raise CorankError(f"shared: {self.basis!r} holds no basis of shape {shape}.")
        self._owner = (owner,)
        owner.followed = True  # type: ignore[assignment]

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    @property
    def down(self) -> nn.Module:
        """The owner's `down`.

        Raises:
            CorankError: the layer has not been wired.
        """
        if not self._owner:
            raise CorankError(f"shared: this layer is not wired to {self.basis!r}; call follow(owner).")
        return self._owner[0].down  # type: ignore[return-value]

    def factors(self) -> SharedLowRank:
        return SharedLowRank(values(self.up), values(self.down), self.basis)

    def spec(self) -> dict[str, Any]:
        shape = [self.out_features, self.in_features]
        own = {"kind": self.kind, "rank": self.rank, "shape": shape, "basis": self.basis}
        return {**own, "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        return self.up(self.down(x))


def wire(root: nn.Module) -> None:
    """Connect every follower under `root` to the owner its spec names.

    Raises:
        CorankError: an owner is missing or holds no fitting basis.
    """
    layers = dict(root.named_modules())
    for name, layer in layers.items():
        if isinstance(layer, SharedLowRankLinear):
            if layer.basis not in layers:
                raise CorankError(f"shared: {name!r} reads a basis of {layer.basis!r}, which does not exist.")
            layer.follow(layers[layer.basis])
