"""Factors stored as 8-bit or 4-bit integers with scales: plain tensors on disk, torchao's tensors in memory.

| bits | on disk | in memory |
|---|---|---|
| 8 | `weight` int8 [m, n], `weight_scale` fp32 [m, 1] | torchao `Int8Tensor`, 8 bits a value |
| 4 | `weight_packed` uint8 [m, n / 2], `weight_scale` [m, n / group] | torchao `IntxUnpackedToInt8Tensor`, 8 bits a value |

Both are symmetric and weight-only: value = integer * scale, activations stay in floating point. The spec of a module
says which of its parts are stored so: `"quantized": {"down": {"bits": 8, "scale": "float32"}, ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.factors import FactorizedLinear

BITS = (8, 4)
NEEDED = ("Int8Tensor", "Int8WeightOnlyConfig", "IntxUnpackedToInt8Tensor", "IntxWeightOnlyConfig", "PerGroup")
Spec = dict[str, Any]


class StoredLinear(nn.Module):
    """Holds the tensors of a quantized linear layer between the file and `unpack`; it does not compute.

    Args:
        shape: (m, n) of the matrix.
        spec: {"bits", "scale", "group" for 4 bits}.
        bias: whether there is one.
        device, dtype: of the buffers, and of the bias.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        spec: Mapping[str, Any],
        bias: bool,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        m, n = shape
        self.bits, self.group = int(spec["bits"]), int(spec.get("group") or n)
        if self.bits not in BITS:
            raise CorankError(f"This checkpoint has factors of {self.bits} bits; upgrade with `pip install -U corank`.")
        name, values = ("weight", (m, n)) if self.bits == 8 else ("weight_packed", (m, n // 2))
        kind = torch.int8 if self.bits == 8 else torch.uint8
        self.register_buffer(name, torch.empty(values, dtype=kind, device=device))
        scales = torch.empty(m, n // self.group, dtype=getattr(torch, spec["scale"]), device=device)
        self.register_buffer("weight_scale", scales)
        self.dtype = dtype
        own = nn.Parameter(torch.empty(m, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", own)


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Spec, dict[str, Tensor]] | None:
    """Round a matrix to integers with torchao.

    Four bits need rows that consist of whole groups; others get eight. A matrix that would not become smaller (very
    few columns, or none) is not rounded at all.

    Args:
        weight: [m, n], floating point.
        bits: 8, one scale a row; or 4, one scale for every `group` values of a row.
        group: even; of 4-bit matrices only.

    Returns:
        (spec, tensors as stored), or None where nothing is to be gained.

    Raises:
        CorankError: torchao is not installed or too old, or the weight is not finite.
    """
    m, n = weight.shape
    if bits == 4 and (n == 0 or n % group):
        bits = 8
    scales = torch.float32 if bits == 8 or weight.element_size() >= 4 else torch.bfloat16
    per_row = n + 4 if bits == 8 else n // 2 + n // group * scales.itemsize
    if m == 0 or per_row >= n * weight.element_size():
        return None
    if not bool(torch.isfinite(weight).all()):
        raise CorankError("A factor holds NaN or infinite values; it cannot be quantized.")
    tensor = _rounded(weight.detach().float(), bits, group)  # in 16 bits torchao's own arithmetic would cost accuracy
    spec: Spec = {"bits": bits, "scale": str(scales).removeprefix("torch.")}
    scale = tensor.scale.reshape(m, -1).to(scales).contiguous()
    if bits == 8:
        return spec, {"weight": tensor.qdata, "weight_scale": scale}
    return {**spec, "group": group}, {"weight_packed": pack(tensor.qdata), "weight_scale": scale}


def _rounded(weight: Tensor, bits: int, group: int) -> Any:
    """torchao's tensor of a matrix."""
    torchao = need_torchao()
    if bits == 8:
        config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(group))  # type: ignore[attr-defined]
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    torchao.quantize_(layer, config)
    return layer.weight


def pack(values: Tensor) -> Tensor:
    """int8 [m, n] of -8..7 -> uint8 [m, n / 2]: two to a byte, the even column in the low half."""
    nibbles = values.to(torch.uint8) & 15
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def multiplied_out(tensors: Mapping[str, Tensor]) -> Tensor:
    """fp32 [m, n] from the tensors of one part as stored, without torchao."""
    values = tensors["weight"] if "weight" in tensors else unpack(tensors["weight_packed"])
    scale = tensors["weight_scale"]
    blocks = values.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[:, :, None]
    return blocks.flatten(1)


def as_linear(stored: StoredLinear) -> nn.Linear:
    """The layer that computes: an `nn.Linear` whose weight is a tensor of torchao.

    Raises:
        CorankError: torchao is not installed or too old.
    """
    torchao = need_torchao()
    m, n = stored.out_features, stored.in_features
    scale: Any = stored.weight_scale
    if stored.bits == 8:
        weight = torchao.Int8Tensor(stored.weight, scale, [1, n], stored.dtype)
    else:
        zero = torch.zeros_like(scale, dtype=torch.int8)
        weight = torchao.IntxUnpackedToInt8Tensor(
            unpack(stored.weight_packed),  # type: ignore[arg-type]
            scale,
            zero,
            torch.int4,  # type: ignore[attr-defined]
            (1, stored.group),
            stored.dtype,
            None,
        )
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = m, n
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = stored.bias  # type: ignore[assignment]
    return layer.train(stored.training)


def reserve(layer: FactorizedLinear, specs: Mapping[str, Spec]) -> None:
    """Replace the parts of an empty layer that are stored as integers by placeholders for a loader to fill.

    Raises:
        CorankError: the spec names a part that the layer does not have, or a number of bits unknown here.
    """
    for part, spec in specs.items():
        old: Any = getattr(layer, part, None)
        if part not in dict(layer.named_children()):
            raise CorankError(f"The checkpoint quantizes {part!r}, which a layer of kind {layer.kind} does not have.")
        shape = old.out_features, old.in_features
        setattr(layer, part, StoredLinear(shape, spec, old.bias is not None, old.weight.device, old.weight.dtype))


def ready(root: nn.Module) -> int:
    """Turn every filled placeholder under `root` into the layer that computes.

    Returns:
        How many there were.

    Raises:
        CorankError: one is not in memory, or torchao is missing.
    """
    found = [(name, layer) for name, layer in root.named_modules() if isinstance(layer, StoredLinear)]
    for name, layer in found:
        if any(tensor.is_meta for tensor in layer.state_dict().values()):
            raise CorankError("Quantized factors cannot be offloaded; load the model on one device.")
        root.set_submodule(name, as_linear(layer))
    return len(found)


def specs_of(layer: FactorizedLinear) -> dict[str, Spec]:
    """Part -> spec of the parts that are stored as integers; empty for an ordinary layer."""
    found: dict[str, Spec] = {}
    for part, child in layer.named_children():
        weight: Any = getattr(child, "weight", None)
        if hasattr(weight, "qdata"):
            group = {"group": int(weight.block_size[1])} if hasattr(weight, "target_dtype") else {}
            bits = 4 if group else 8
            found[part] = {"bits": bits, "scale": str(weight.scale.dtype).removeprefix("torch."), **group}
    return found


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `state_dict` with torchao's tensors taken apart into what is stored."""
    result: dict[str, Tensor] = {}
    tensor: Any
    for name, tensor in state.items():
        if not hasattr(tensor, "qdata"):
            result[name] = tensor
        elif hasattr(tensor, "target_dtype"):
            result[f"{name}_packed"], result[f"{name}_scale"] = pack(tensor.qdata), tensor.scale
        else:
            result[name], result[f"{name}_scale"] = tensor.qdata, tensor.scale
    return result


def floating(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of one module as stored, integers multiplied out with their scales (fp32), the others as they are."""
    result = []
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        scale = tensors.get(f"{stem}.weight_scale")
        if scale is not None and leaf in ("weight", "weight_packed"):
            result.append(multiplied_out({leaf: tensor, "weight_scale": scale}))
        elif leaf != "weight_scale":
            result.append(tensor)
    return result


def need_torchao() -> Any:
    """`torchao.quantization`.

    Raises:
        CorankError: torchao is not installed, or too old to have what is needed.
    """
    try:
        from torchao import quantization
    except ImportError:
        quantization = None  # type: ignore[assignment]
    if not all(hasattr(quantization, name) for name in NEEDED):
        raise CorankError("Quantized factors need torchao; install it with `pip install -U 'corank[quant]'`.")
    return quantization
