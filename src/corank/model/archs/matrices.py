"""Which modules hold a matrix that can be factorized, and in what form."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from corank.factors import is_conv1d


@functools.cache
def _computes_linear(cls: type) -> bool:
    """Whether a subclass of nn.Linear computes W x + b like its parent (Falcon's does, a router does not)."""
    try:
        layers = [cls(3, 2, bias=bias) for bias in (False, True)]
        x = torch.linspace(-1, 1, 12).view(2, 2, 3)
        with torch.no_grad():
            return all(torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6) for layer in layers)
    except Exception:
        return False


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: nn.Linear, a subclass that computes the same, or transformers' Conv1D."""
    if type(module) is nn.Linear or is_conv1d(module):
        return True
    # those that hold their matrix in another way (factorized, with an adapter) have further parameters or none
    plain = isinstance(module, nn.Linear) and set(module._parameters) == {"weight", "bias"} and not module._modules
    cls: Any = type(module)
    return plain and _computes_linear(cls)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a 2-D convolution whose kernel is one matrix [out, in * height * width]."""
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def is_embedding(module: nn.Module | None) -> bool:
    """Whether a module looks rows up in a table, with or without a constant factor behind it."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.sparse:
        return False
    return type(module).forward is nn.Embedding.forward or hasattr(module, "scalar_embed_scale")


def is_matrix(module: nn.Module) -> bool:
    """Whether a module can be a site where it stands (embeddings are sites only as input embeddings)."""
    return is_linear(module) or is_convolution(module)
