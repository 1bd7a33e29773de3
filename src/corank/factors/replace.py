"""Putting layers into a model and making plain ones of them again; here it is known how each class stores its matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError, unknown
from corank.factors.base import FactorizedLinear, Factors, linear
from corank.factors.convolution import FactorizedConv2d
from corank.factors.dense import DenseLinear
from corank.factors.embedding import FactorizedEmbedding, TiedEmbedding, scale_of
from corank.factors.low_rank import LowRank


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' `Conv1D`, a linear layer whose weight is stored as [in, out].

    Recognised by its attributes, so that no import is needed.
    """
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and hasattr(layer, "nx")


def weight_of(layer: nn.Module) -> Tensor:
    """The matrix [out, in] of a dense or factorized layer, detached, whatever its storage.

    That of a convolution is [out, in * height * width], that of an embedding [d, V].

    Raises:
        CorankError: the layer is not linear.
    """
    if hasattr(layer, "dense_weight"):
        return layer.dense_weight()  # type: ignore[operator]
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return layer.weight.detach().flatten(1)
    if isinstance(layer, nn.Embedding):
        return layer.weight.detach().mT
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise CorankError(f"{type(layer).__name__} is not a linear layer; give an nn.Linear or a Conv1D.")
    return weight.detach().mT if is_conv1d(layer) else weight.detach()


def materialise(layer: nn.Module) -> nn.Linear:
    """A plain `nn.Linear` computing the same map: dtype, device, training mode and bias are kept.

    Args:
        layer: factorized, `nn.Linear` or transformers' `Conv1D`.

    Raises:
        CorankError: the layer is not linear.
    """
    bias: Any = getattr(layer, "bias", None)
    plain = linear(weight_of(layer), bias)
    return plain.train(layer.training)


def as_stock(layer: nn.Module, transposed: bool) -> nn.Module:
    """The dense layer in the storage the architecture had: `nn.Linear`, `Conv1D` when `transposed`, and so on."""
    if hasattr(layer, "as_stock"):
        return layer.as_stock()  # type: ignore[operator]
    plain = materialise(layer)
    if not transposed:
        return plain
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv = Conv1D(plain.out_features, plain.in_features)
    conv.weight = nn.Parameter(plain.weight.detach().mT.clone(memory_format=torch.contiguous_format))
    # Conv1D always has a bias.
    bias = plain.bias if plain.bias is not None else plain.weight.new_zeros(plain.out_features)
    conv.bias = nn.Parameter(bias.detach())
    return conv.train(layer.training)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, without building its matrix."""
    if is_conv1d(layer):
        return layer.nf, layer.nx  # type: ignore[return-value]
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.weight[0].numel()
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    if not hasattr(layer, "out_features"):
        raise CorankError(f"{type(layer).__name__} is not a linear layer; give an nn.Linear or a Conv1D.")
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def layer_for(old: nn.Module, factors: Factors, bias: Tensor | None) -> nn.Module:
    """The layer that computes with `factors` where `old` stands.

    Args:
        old: dense; a linear layer, a convolution or an embedding.
        factors: of its matrix as `weight_of` gives it.
        bias: [m] or None.

    Raises:
        CorankError: a convolution or an embedding, and factors that are not a plain pair.
    """
    if not isinstance(old, nn.Conv2d | nn.Embedding):
        return factors.module(bias)
    if not isinstance(factors, LowRank):
        what = "A convolution" if isinstance(old, nn.Conv2d) else "An embedding"
        raise CorankError(f"{what} is stored as a plain pair of factors (low_rank), not as {factors.kind}.")
    if isinstance(old, nn.Conv2d):
        return FactorizedConv2d.replacing(old, factors, bias)
    return FactorizedEmbedding.replacing(old, factors)


def tied_to(old: nn.Module, head: nn.Module, name: str) -> TiedEmbedding:
    """The embedding that reads its rows from the factors of the head, called `name`, in place of `old`."""
    m, n = shape_of(head)
    layer = TiedEmbedding((n, m), head.rank, name, head.weight, scale_of(old)).standing_for(old)  # type: ignore[arg-type]
    layer.follow(head)
    return layer


def replace(root: nn.Module, name: str, new_module: nn.Module) -> nn.Module:
    """Put `new_module` where `root.<name>` is and return the layer that was there.

    The training mode is carried over. A factorized layer remembers whether it stands for a `Conv1D` and
    whether it brings a bias that was not there; a dense layer takes the storage of the one it replaces.

    Args:
        root: the model.
        name: dotted name, as in `named_modules()`.
        new_module: a layer with the same in and out sizes.

    Raises:
        CorankError: no such module, or the sizes differ.
    """
    try:
        old = root.get_submodule(name)
    except AttributeError:
        raise unknown("module", name, (known for known, _ in root.named_modules() if known)) from None
    if not name:
        raise CorankError("replace needs the name of a module below the root.")
    if shape_of(old) != shape_of(new_module):
        sizes = f"{list(shape_of(old))} by one {list(shape_of(new_module))}"
        raise CorankError(f"{name}: a layer [out, in] = {sizes} cannot be replaced, the sizes must agree.")
    transposed = is_conv1d(old) or getattr(old, "transposed", False)
    new_module.train(old.training)
    if isinstance(new_module, FactorizedEmbedding) and hasattr(old, "padding_idx"):
        new_module.standing_for(old)
    if isinstance(new_module, FactorizedLinear):
        new_module.transposed = transposed
    elif transposed and not is_conv1d(new_module):
        new_module = as_stock(new_module, transposed=True)
    if isinstance(new_module, FactorizedLinear | DenseLinear):
        had_bias = getattr(old, "bias", None) is not None and not getattr(old, "added_bias", False)
        new_module.added_bias = new_module.bias is not None and not had_bias
    root.set_submodule(name, new_module)
    return old
