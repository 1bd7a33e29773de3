"""Embeddings in two factors: a row of the table is a row of A^T times B^T. And a table that is the head's, transposed.

The matrix of an embedding is W: [d, V], applied to the indicator of a token: `down` holds A^T [V, k] and looks rows
up, `up` is B [d, k].
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corank.errors import CorankError
from corank.factors.base import FactorizedLinear, linear
from corank.factors.low_rank import LowRank


def scale_of(embedding: nn.Module) -> float:
    """The constant that an architecture multiplies its embeddings by (Gemma: sqrt(d)), 1 if there is none."""
    scale = getattr(embedding, "scalar_embed_scale", None) or getattr(embedding, "embed_scale", None)
    return 1.0 if scale is None else float(scale)


def table(weight: Tensor) -> nn.Embedding:
    """A lookup table with a copy of these rows, [V, k] (sizes of zero are welcome)."""
    layer = nn.Embedding(1, 1, device="meta")
    layer.num_embeddings, layer.embedding_dim = weight.shape
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    return layer


class FactorizedEmbedding(FactorizedLinear):
    """y = scale * up(down[token]): `down` is A^T [V, k], `up` is B [d, k].

    Attributes:
        scale: constant behind the lookup.
        stock: class of the layer it replaces.
        padding_idx: of the layer it replaces.
    """

    kind: ClassVar[str] = "low_rank"
    form: ClassVar[str] = "embedding"

    def __init__(self, B: Tensor, A: Tensor, scale: float = 1.0) -> None:
        super().__init__((B.shape[0], A.shape[1]), B.shape[1], like=B)
        self.embedding_dim, self.num_embeddings = B.shape[0], A.shape[1]
        self.scale = scale
        self.stock: type[nn.Module] = nn.Embedding
        self.padding_idx: int | None = None
        self.down = table(A.T)
        self.up = linear(B)

    @classmethod
    def replacing(cls, old: nn.Module, factors: LowRank) -> Self:
        """The layer for the factors of an embedding."""
        return cls(factors.B, factors.A, scale_of(old)).standing_for(old)

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
        return cls(B, B.new_empty(k, n), spec.get("scale", 1.0))

    def standing_for(self, old: Any) -> Self:
        """Remember what is needed to put a dense layer of the architecture's own class back."""
        self.stock = getattr(old, "stock", None) or type(old)
        self.padding_idx = old.padding_idx
        return self

    @property
    def bias(self) -> None:
        return None

    def factors(self) -> LowRank:
        return LowRank(self.up.weight.detach(), self.down.weight.detach().T)

    def spec(self) -> dict[str, Any]:
        return {**self.factors().spec(), "form": self.form, "scale": self.scale}

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [...] -> y [..., d]."""
        y = self.up(self.down(input))
        return y if self.scale == 1.0 else y * torch.tensor(self.scale, dtype=y.dtype, device=y.device)

    def as_stock(self) -> nn.Module:
        """The dense embedding, of the class that the architecture has."""
        W = self.dense_weight().T
        extra: dict[str, Any] = {} if self.stock is nn.Embedding else {"embed_scale": self.scale}
        layer: Any = self.stock(self.num_embeddings, self.embedding_dim, self.padding_idx, **extra)
        layer.to(W.device)
        layer.weight = nn.Parameter(W.contiguous())
        return layer.train(self.training)


class TiedEmbedding(FactorizedEmbedding):
    """The embedding of a model whose output matrix is the same table: it stores nothing and reads the head's factors.

    With the head W' = B A: [V, d], the row of a token is its row of B times A. The head is kept outside the module
    tree, so that its factors are registered, saved and trained once.

    Attributes:
        owner: path of the head.
    """

    form: ClassVar[str] = "tied"

    def __init__(self, shape: tuple[int, int], rank: int, owner: str, like: Tensor, scale: float = 1.0) -> None:
        FactorizedLinear.__init__(self, shape, rank, like=like)
        self.embedding_dim, self.num_embeddings = shape
        self.scale, self.owner = scale, owner
        self.stock, self.padding_idx = nn.Embedding, None
        self._head: tuple[Any, ...] = ()  # a tuple, because nn.Module would register a bare module

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        like = torch.empty(0, device=device, dtype=dtype)
        return cls(tuple(spec["shape"]), spec["rank"], spec["owner"], like, spec.get("scale", 1.0))

    def follow(self, head: nn.Module) -> None:
        """Read the factors of `head`.

        Raises:
            CorankError: they are not those of a head of this size.
        """
        rows = getattr(getattr(head, "up", None), "weight", None)
        if rows is None or tuple(rows.shape) != (self.num_embeddings, self.rank):
            raise CorankError(f"The embedding reads its rows from {self.owner!r}, which holds no fitting factors.")
        self._head = (head,)
        head.followed = True  # type: ignore[assignment]

    def factors(self) -> LowRank:
        if not self._head:
            raise CorankError(f"The embedding is not wired to {self.owner!r}; call follow(head).")
        head = self._head[0]
        return LowRank(head.down.weight.detach().T, head.up.weight.detach().T)

    def spec(self) -> dict[str, Any]:
        shape = [self.out_features, self.in_features]
        own = {"kind": self.kind, "rank": self.rank, "shape": shape}
        return {**own, "form": self.form, "owner": self.owner, "scale": self.scale}

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [...] -> y [..., d].

        Raises:
            CorankError: there are adapters on the head's factors, of which the embedding would know nothing.
        """
        head = self._head[0]
        if hasattr(head.up, "base_layer") or hasattr(head.down, "base_layer"):
            raise CorankError(
                "The embedding reads the factors of the head, so these cannot take adapters of their own; choose the "
                "layers to adapt with corank.heal.lora_config, which leaves the head alone."
            )
        y = F.embedding(input, head.up.weight) @ head.down.weight
        return y if self.scale == 1.0 else y * torch.tensor(self.scale, dtype=y.dtype, device=y.device)


def wire_tied(root: nn.Module) -> None:
    """Connect every tied embedding under `root` to the head its spec names.

    A model loaded without its head keeps no table to read from, which is an error.

    Raises:
        CorankError: the head is missing or holds no fitting factors.
    """
    layers = dict(root.named_modules())
    for layer in layers.values():
        if isinstance(layer, TiedEmbedding):
            if layer.owner not in layers:
                raise CorankError(
                    f"The embedding of this model reads its rows from {layer.owner!r}, which this class does not have; "
                    "load it with its head (e.g. AutoModelForCausalLM)."
                )
            layer.follow(layers[layer.owner])
