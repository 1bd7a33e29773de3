"""The parameters of one vLLM layer that holds factorized matrices, and the loader that fills them.

A vLLM layer may be several stored matrices side by side (query, key and value), each factorized with a rank of its own or
dense. vLLM renames `...q_proj.down.weight` to `...qkv_proj.down.weight`, looks for a parameter of that name and calls its
`weight_loader(parameter, tensor, shard_id)`. So the layer gets a parameter for every name that can arrive:

| name | what it is |
|---|---|
| `down.weight` | [sum of ranks, in], all that is applied to the input as it is, in one matrix |
| `weight` | [rows of the dense matrices, in]; where there is none, empty, as in the checkpoint |
| `up.weight`, `up.bias`, `link.weight`, `pivots` | empty: they only pass on what arrives |

What they pass on lies in `factors.<i>`, one entry per stored matrix. A bias goes to the layer's own `bias`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.serve.vllm import slicing
from corank.serve.vllm.specs import Spec

DOWN = {"low_rank", "cur", "row_pivoted"}
"""Kinds whose first factor is applied to the whole input."""

STORED = {
    "dense": {"weight"},
    "low_rank": {"down", "up"},
    "cur": {"down", "link", "up"},
    "row_pivoted": {"down", "pivots", "up"},
    "column_pivoted": {"down", "pivots", "up"},
    "shared": {"up"},
}
"""Tensors of each kind, bias and empty guard excluded."""

TOGETHER = {"row_pivoted": {"pivots", "up"}, "column_pivoted": {"pivots", "down"}}
"""Tensors that have to wait for each other: which numbers a rank holds depends on where the pivots fall."""


class Part:
    """One stored matrix inside a layer, and what this rank holds of it.

    Attributes:
        name: in the checkpoint.
        spec: None for a dense matrix, of which config.json says nothing.
        kind: of its factors.
        widths: outputs on this rank, one number per logical matrix in it.
        offset: its first output in the layer.
        held: the tensors this rank holds: `up` [rows, k], `link` [k, k], `down` [k, s] and the indices of pivoted kinds.
        span: its rows in `down.weight` of the layer, or in `weight` if it is dense; None if it has none there.
        owner: kind shared: (layer, part) that holds the basis, known once all layers exist.
        arrived: the tensors that have been loaded.
    """

    def __init__(self, name: str, spec: Spec | None, widths: Sequence[int], offset: int) -> None:
        self.name, self.spec, self.widths, self.offset = name, spec, tuple(widths), offset
        self.kind = spec.kind if spec else "dense"
        self.rank = spec.rank if spec else 0
        self.rows = sum(widths)
        self.held = nn.Module()
        self.span: tuple[int, int] | None = None
        self.owner: tuple[nn.Module, Part] | None = None
        self.arrived: set[str] = set()
        self.waiting: dict[str, Tensor] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored tensor -> its shape in the checkpoint, for a factorized matrix."""
        assert self.spec is not None
        (m, n), k = self.spec.shape, self.rank
        return {
            "down": (k, n - k if self.kind == "column_pivoted" else n),
            "link": (k, k),
            "up": (m - k if self.kind == "row_pivoted" else m, k),
            "pivots": (k,),
            "bias": (m,),
        }


class Parts:
    """The stored matrices of one layer on one rank; `create` makes them.

    Args:
        layer: vLLM's.
        parts: in the order of its outputs.
        columns: (start, stop) of the input features on this rank.
        rank, world: of tensor parallelism.
    """

    def __init__(self, layer: nn.Module, parts: list[Part], columns: tuple[int, int], rank: int, world: int) -> None:
        self.parts, self.columns, self.rank, self.world = parts, columns, rank, world
        self.replicas = int(getattr(layer, "num_kv_head_replicas", 1))

    def find(self, shard: Any, layer: str) -> Part:
        """The part that a shard id of vLLM means: "q", "k", "v", a number, or None where there is only one."""
        index = {"q": 0, "k": 1, "v": 2}.get(shard, shard) if isinstance(shard, str) else shard
        if index is None and len(self.parts) == 1:
            return self.parts[0]
        if not isinstance(index, int) or not 0 <= index < len(self.parts) or len(self.parts[index].widths) != 1:
            names = ", ".join(part.name for part in self.parts)
            raise CorankError(
                f"{layer} holds {names}, and vLLM's code for this architecture loads a part {shard!r} of it; it takes the "
                "stored matrix apart in a way that factors do not allow. Write a dense model with `corank dequantize`."
            )
        return self.parts[index]

    def rows(self, part: Part, total: int) -> Tensor:
        """The rows of a stored matrix with `total` rows that this rank holds."""
        try:
            return slicing.rows_of(total, part.widths, self.rank, self.world, self.replicas)
        except CorankError as error:
            raise CorankError(f"{part.name}: {error}") from None


def create(
    layer: nn.Module,
    stored: Sequence[tuple[str, Spec | None]],
    input_size_per_partition: int,
    output_partition_sizes: Sequence[int],
    input_size: int,
    params_dtype: torch.dtype,
) -> Parts:
    """Give a layer its parameters.

    Args:
        layer: a linear layer of vLLM, whose `tp_rank` and `tp_size` are set.
        stored: (name in the checkpoint, spec or None if dense) of the matrices in it, in the order of its outputs.
        input_size_per_partition, output_partition_sizes, input_size, params_dtype: as vLLM gives them to `create_weights`.

    Raises:
        CorankError: the sizes of the layer are not those of the stored matrices.
    """
    name = getattr(layer, "prefix", "") or stored[0][0]
    sizes = list(output_partition_sizes)
    if len(stored) not in (1, len(sizes)):
        raise CorankError(
            f"{name}: vLLM splits its outputs into {len(sizes)} and the checkpoint into {len(stored)}; this layer cannot be "
            "served factorized. Write a dense model with `corank dequantize`."
        )
    groups = [sizes] if len(stored) == 1 else [[size] for size in sizes]
    rank, world = _parallel(layer)
    start = rank * input_size_per_partition if input_size_per_partition != input_size else 0
    starts = accumulate((sum(group) for group in groups), initial=0)
    parts = [Part(n, spec, group, offset) for (n, spec), group, offset in zip(stored, groups, starts, strict=False)]
    made = Parts(layer, parts, (start, start + input_size_per_partition), rank, world)
    for part in parts:
        _check(made, part, input_size)
    _allocate(layer, name, made, params_dtype)
    return made


def _parallel(layer: nn.Module) -> tuple[int, int]:
    world = int(getattr(layer, "tp_size", None) or 1)
    rank = getattr(layer, "tp_rank", None)
    if rank is None and world > 1:
        raise CorankError(
            "This vLLM does not say which tensor-parallel rank a layer is on; upgrade vLLM or use one GPU."
        )
    return int(rank or 0), world


def _check(parts: Parts, part: Part, input_size: int) -> None:
    if part.spec is None:
        return
    m, n = part.spec.shape
    if n != input_size:
        raise CorankError(
            f"{part.name}: config.json describes a matrix with {n} inputs and the model has {input_size}; they do not belong "
            "together."
        )
    parts.rows(part, m)
    if part.kind == "row_pivoted" and part.name.rpartition(".")[2] == "query_key_value":
        raise CorankError(
            f"{part.name}: vLLM reorders the rows of this matrix while it loads, which a row-pivoted one (row-id, or any "
            "method with pack=true) does not survive; compress with pack=false, or use `corank dequantize`."
        )


def _allocate(layer: nn.Module, name: str, parts: Parts, dtype: torch.dtype) -> None:
    width = parts.columns[1] - parts.columns[0]
    down = dense = 0
    for part in parts.parts:
        if part.kind == "dense":
            part.span, dense = (dense, dense + part.rows), dense + part.rows
        elif part.kind in DOWN:
            part.span, down = (down, down + part.rank), down + part.rank
        # what is stored as it arrives, apart from the slice, has its place now; the rest depends on where pivots fall
        if part.kind not in ("dense", "row_pivoted"):
            part.held.register_parameter("up", _parameter(torch.empty(part.rows, part.rank, dtype=dtype)))
        if part.kind == "cur":
            part.held.register_parameter("link", _parameter(torch.empty(part.rank, part.rank, dtype=dtype)))

    def gate(where: nn.Module, leaf: str, tensor: str, value: Tensor, output_dim: int | None = None) -> None:
        parameter: Any = _parameter(value)
        parameter.weight_loader = _loader(layer, name, parts, tensor)
        if output_dim is not None:
            parameter.output_dim = output_dim  # some architectures reorder the rows of what they load if this is set
        where.register_parameter(leaf, parameter)

    tensors = set().union(*(STORED[part.kind] for part in parts.parts))
    biased = [part for part in parts.parts if part.spec and part.spec.bias]
    whole = {} if any(part.kind == "row_pivoted" for part in parts.parts) else {"output_dim": 0}
    gate(layer, "weight", "weight", torch.empty(dense, width, dtype=dtype), **({"output_dim": 0} if dense else {}))
    for child in ("down", "link", "up"):
        if child in tensors:
            layer.add_module(child, nn.Module())
    if "down" in tensors:
        gate(layer.down, "weight", "down", torch.empty(down, width, dtype=dtype))  # type: ignore[arg-type]
    if "link" in tensors:
        gate(layer.link, "weight", "link", torch.empty(0, dtype=dtype))  # type: ignore[arg-type]
    if "up" in tensors:
        gate(layer.up, "weight", "up", torch.empty(0, dtype=dtype), **whole)  # type: ignore[arg-type]
    if any(part.kind not in ("dense", "row_pivoted") for part in biased):
        gate(layer.up, "bias", "bias", torch.empty(0, dtype=dtype), output_dim=0)  # type: ignore[arg-type]
    if "pivots" in tensors:
        gate(layer, "pivots", "pivots", torch.empty(0, dtype=torch.int32))
    layer.add_module("factors", nn.ModuleList(part.held for part in parts.parts))
    if biased:
        gate(layer, "bias", "bias", torch.zeros(sum(part.rows for part in parts.parts), dtype=dtype), output_dim=0)
        layer.bias.added = True  # type: ignore[union-attr]
        _keep_bias(layer)


def _keep_bias(layer: nn.Module) -> None:
    """Let the layer keep the bias it was just given, should its architecture have none.

    vLLM's layers set `bias` after `create_weights`: to a parameter of theirs, which then takes the place of ours, or to
    None. In the second case their loaders would drop the tensor without a word.
    """
    stock = layer.register_parameter

    def register(name: str, param: nn.Parameter | None) -> None:
        if name == "bias":
            del layer.register_parameter  # once is enough
            if param is None:
                return
        stock(name, param)

    layer.register_parameter = register  # type: ignore[method-assign]


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _loader(layer: nn.Module, name: str, parts: Parts, tensor: str) -> Callable[..., None]:
    def weight_loader(param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        _receive(layer, parts, parts.find(loaded_shard_id, name), tensor, loaded_weight)

    return weight_loader


def _receive(layer: Any, parts: Parts, part: Part, tensor: str, value: Tensor) -> None:
    """Put this rank's part of a stored tensor where it belongs."""
    columns = slice(*parts.columns)
    if tensor == "weight" and part.kind != "dense":
        if value.numel():
            raise CorankError(
                f"{part.name} is stored dense and config.json says {part.kind}; they do not belong together."
            )
        return
    if tensor not in STORED[part.kind] | {"bias"}:
        raise CorankError(
            f"{part.name}: the checkpoint has a tensor {tensor!r} for it, which a {part.kind} matrix has not."
        )
    if part.spec is not None and part.kind != "dense":
        value = _oriented(part, tensor, value)
    if tensor == "weight":
        assert part.span is not None
        layer.weight.data[slice(*part.span)].copy_(value[parts.rows(part, value.shape[0])][:, columns])
    elif tensor == "bias":
        layer.bias.data[part.offset : part.offset + part.rows].copy_(value[parts.rows(part, value.shape[0])])
    elif tensor in TOGETHER.get(part.kind, ()):
        _pivoted(layer, parts, part, tensor, value)
    elif tensor == "down":
        assert part.span is not None
        layer.down.weight.data[slice(*part.span)].copy_(value[:, columns])
    elif tensor == "up":
        _put(layer, part, "up", value[parts.rows(part, value.shape[0])])
    else:
        _put(layer, part, tensor, value)
    part.arrived.add(tensor)


def _oriented(part: Part, tensor: str, value: Tensor) -> Tensor:
    """The tensor as it was stored.

    Architectures whose dense layers are stored [in, out] (GPT-2) get every weight transposed by vLLM, factors included,
    which are not stored that way. Files hold rows first, so a matrix with columns first has been turned.
    """
    shape = part.shapes()[tensor]
    if len(shape) == 2 and value.dim() == 2 and tuple(value.shape) == shape[::-1]:
        turned = not value.is_contiguous() and value.mT.is_contiguous()
        if shape[0] != shape[1] or turned:
            value = value.mT
    if tuple(value.shape) != shape:
        raise CorankError(
            f"{part.name}: {tensor} has shape {list(value.shape)} in the weight files and {list(shape)} in config.json; they do "
            "not belong together."
        )
    return value


def _pivoted(layer: Any, parts: Parts, part: Part, tensor: str, value: Tensor) -> None:
    """The pivots, or the coefficients they go with."""
    part.waiting[tensor] = value.to("cpu", copy=True)  # some readers use their buffers again
    if set(part.waiting) != TOGETHER[part.kind]:
        return
    assert part.spec is not None
    pivots, total = part.waiting["pivots"], part.spec.shape[0]
    if part.kind == "row_pivoted":
        kept, index = slicing.row_pivoted(pivots, part.waiting["up"], parts.rows(part, total), total)
        found = {"up": kept, "index": index}
    else:
        take, others, kept = slicing.column_pivoted(pivots, part.waiting["down"], *parts.columns)
        found = {"down": kept, "take": take, "others": others}
    for name, tensor_ in found.items():
        _put(layer, part, name, tensor_)
    part.waiting = {}


def _put(layer: Any, part: Part, name: str, value: Tensor) -> None:
    """Store a tensor; in place where there is one of its shape, as captured graphs keep the address."""
    old = getattr(part.held, name, None)
    if old is not None and old.shape == value.shape:
        old.data.copy_(value)
        return
    like = layer.weight
    if value.is_floating_point():
        part.held.register_parameter(name, _parameter(value.to(like.device, like.dtype, copy=True)))
    else:
        part.held.register_buffer(name, value.to(like.device), persistent=False)


def check_complete(layer: nn.Module, parts: Parts) -> None:
    """Raise `CorankError` if a tensor of the checkpoint has not arrived: vLLM itself does not look."""
    ours = getattr(getattr(layer, "bias", None), "added", False)
    for part in parts.parts:
        expected = set(STORED[part.kind])
        if part.spec and part.spec.bias and (ours or part.kind not in ("dense", "row_pivoted")):
            expected.add("bias")  # the bias of a dense layer that has one anyway is loaded by vLLM
        missing = sorted(expected - part.arrived)
        if missing:
            raise CorankError(
                f"{part.name}: {', '.join(missing)} did not arrive. The checkpoint is incomplete, or vLLM's code for this "
                "architecture drops it; `corank verify` tells which."
            )
    if ours and getattr(layer, "skip_bias_add", False):
        raise CorankError(
            f"{parts.parts[0].name} was given a bias that vLLM's model does not add; compress with affine=false."
        )


def find_owner(part: Part, parts: Parts, homes: Mapping[str, tuple[nn.Module, Part]]) -> tuple[nn.Module, Part]:
    """(layer, part) that holds the basis of a matrix of kind shared.

    Args:
        part: the matrix.
        parts: of its layer.
        homes: name of a stored matrix -> where it is.

    Raises:
        CorankError: no layer in this process holds it, or it is not split over ranks like this layer's input.
    """
    assert part.spec is not None and part.spec.basis is not None
    if part.spec.basis not in homes:
        raise CorankError(
            f"{part.name} reads the basis of {part.spec.basis}, which is not in this process: layers that share a basis must "
            "be on one pipeline stage. Use --pipeline-parallel-size 1."
        )
    home: Any
    home, owner = homes[part.spec.basis]
    expected = (part.rank, parts.columns[1] - parts.columns[0])
    if owner.kind not in DOWN or (owner.rank, home.down.weight.shape[1]) != expected:
        raise CorankError(
            f"{part.spec.basis} holds no basis for {part.name} of rank {expected[0]} and {expected[1]} inputs."
        )
    return home, owner
