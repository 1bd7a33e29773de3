"""What every storable kind has in common: the data (`Factors`) and the layer (`FactorizedLinear`)."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from corank.errors import CorankError


def product(*matrices: Tensor) -> Tensor:
    """Multiply a chain of matrices, accumulating 16-bit ones in fp32; the result has the dtype of the first.

    Args:
        matrices: two or more 2-D tensors of one dtype with matching inner sizes.
    """
    dtype = matrices[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    result = matrices[0].to(wide)
    for matrix in matrices[1:]:
        result = result @ matrix.to(wide)
    return result.to(dtype)


def linear(weight: Tensor, bias: Tensor | None = None, trainable: bool = True) -> nn.Linear:
    """Copy a matrix into an `nn.Linear` without ever initialising one (sizes of zero are welcome).

    It is a copy because factors are often slices of a larger basis, which would otherwise stay in memory.

    Args:
        weight: [out, in].
        bias: [out] or None; cast to the dtype of `weight`.
        trainable: sets `requires_grad` of the weight. The bias is always trainable.

    A weight without values (rank 0, or full rank in a pivoted layer) is a buffer: there is nothing to train, and
    FSDP can neither shard it nor reduce its gradient.
    """
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    if weight.numel() == 0:
        del layer.weight
        layer.register_buffer("weight", _own(weight))
    else:
        layer.weight = nn.Parameter(_own(weight), requires_grad=trainable)
    if bias is not None:
        layer.bias = nn.Parameter(_own(bias).to(weight.dtype))
    return layer


def values(layer: Any) -> Tensor:
    """The matrix of a linear layer, detached; one that is stored as integers (torchao) is multiplied out."""
    weight = layer.weight.detach()
    return weight.dequantize() if hasattr(weight, "qdata") else weight


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def check_shapes(kind: str, **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise `CorankError` unless every named tensor has the shape given beside it."""
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise CorankError(f"{kind}: {name} must have shape {list(shape)}, got {list(tensor.shape)}.")


class Factors(ABC):
    """One m x n matrix in a storable form; a frozen dataclass whose tensor fields are what is stored.

    The count of stored values lives in `count` of each kind and nowhere else.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out, in) of the matrix."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """The number of columns of B in W' = B A."""

    @staticmethod
    @abstractmethod
    def count(m: int, n: int, rank: int) -> int:
        """Stored values of an m x n matrix at this rank, index buffers included, bias excluded."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating point operations (2 per multiply-add) to apply the matrix to `tokens` vectors."""

    @abstractmethod
    def pair(self) -> tuple[Tensor, Tensor]:
        """(B [m, k], A [k, n]) with W' = B A."""

    @abstractmethod
    def module(self, bias: Tensor | None = None) -> nn.Module:
        """The layer y = W' x + bias, in the dtype of the factors.

        Args:
            bias: [m] or None; cast to the dtype of the factors.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the floating-point tensors."""
        return next(tensor.dtype for tensor in self.tensors().values() if tensor.is_floating_point())

    @property
    def numel(self) -> int:
        """Stored values, index buffers included."""
        return self.count(*self.shape, self.rank)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors in their present dtypes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def spec(self) -> dict[str, Any]:
        """What a loader needs to rebuild the empty layer, as JSON: kind, rank, shape."""
        return {"kind": self.kind, "rank": self.rank, "shape": list(self.shape)}

    def dense(self) -> Tensor:
        """W' [m, n] in the dtype of the factors (16-bit factors are multiplied in fp32)."""
        return product(*self.pair())

    def astype(self, dtype: torch.dtype) -> Self:
        """The same factors with the floating-point tensors cast; indices stay integers."""
        cast = {name: t.to(dtype) for name, t in self.tensors().items() if t.is_floating_point()}
        return dataclasses.replace(self, **cast)  # type: ignore[type-var]


class FactorizedLinear(nn.Module):
    """A linear layer whose matrix is stored as factors; takes the place of an `nn.Linear` [out, in].

    It keeps a persistent empty buffer `weight`. A stock loader that does not know the format then finds a
    tensor of the wrong size under the name it is looking for and stops, instead of leaving the layer at
    random; and code that asks for `layer.weight.dtype` or `.device` still gets the answer.

    Attributes:
        in_features, out_features, rank: sizes.
        transposed: the layer it replaces stored its weight as [in, out] (transformers' `Conv1D`).
        added_bias: the layer it replaces had no bias, this one has.
        followed: another layer reads this one's basis, which must therefore keep its shape.
        frozen: names of the parts that do not train.
    """

    kind: ClassVar[str]
    frozen: ClassVar[tuple[str, ...]] = ()
    weight: Tensor

    def __init__(self, shape: tuple[int, int], rank: int, like: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.rank = rank
        self.transposed = False
        self.added_bias = False
        self.followed = False
        self.register_buffer("weight", torch.empty(0, dtype=like.dtype, device=like.device))

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the layer with uninitialised values, to be filled by a loader and then `finalize`d."""
        raise NotImplementedError

    def factors(self) -> Factors:
        """The stored factors (detached views, not copies)."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """W' [out, in], detached, in the dtype of the layer."""
        return self.factors().dense()

    def spec(self) -> dict[str, Any]:
        """The spec of the factors plus whether there is a bias."""
        return {**self.factors().spec(), "bias": self.bias is not None}

    def finalize(self) -> None:
        """Rebuild what is derived from the stored tensors; call after filling a layer made by `from_spec`."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.finalize()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
