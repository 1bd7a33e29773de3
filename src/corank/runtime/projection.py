"""Projection, residual and norm of an encoder's attention, over chunks of tokens.

Encoders that normalise behind the residual keep the three in one module; once the MLP and the heads are small, its four
activations of the size of a hidden state are the peak of the layer.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from torch import Tensor, nn

from corank.factors import FactorizedLinear, shape_of
from corank.runtime.forms import is_linear
from corank.runtime.mlp import chunk_size, spans
from corank.runtime.override import Override, inference


class ChunkedProjection(Override):
    """A module's own forward(hidden, residual) for chunks of tokens.

    Args:
        module: maps x [..., in] and residual [..., out] to [..., out] token by token.
        width: the larger of the two sizes.
        chunk: tokens at a time; None chooses by width and device.
    """

    arity: ClassVar[int] = 2

    def __init__(self, module: nn.Module, width: int, chunk: int | None = None):
        super().__init__(module)
        self.width = width
        self.chunk = chunk

    def compute(self, x: Tensor, residual: Tensor) -> Tensor:
        chunk = self.chunk or chunk_size(self.width, x.element_size(), x.device)
        tokens = x[..., 0].numel()
        if tokens <= chunk or not inference(self.module) or x.shape[:-1] != residual.shape[:-1]:
            return self.original(x, residual)
        flat, other = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
        y = torch.empty_like(other)
        for start, end in spans(tokens, chunk):
            y[start:end] = self.original(flat[None, start:end], other[None, start:end])[0]
        return y.view(residual.shape)


def projections(model: nn.Module, chunk: int | None = None) -> list[Override]:
    """The overrides for every such module with factors; not yet in place."""
    found: list[Override] = []
    for module in model.modules():
        linears = [child for child in module.children() if is_linear(child)]
        if len(linears) != 1 or not isinstance(linears[0], FactorizedLinear) or not _fits(module):
            continue
        override = ChunkedProjection(module, max(shape_of(linears[0])), 2)
        if _tokenwise(override, *shape_of(linears[0])):
            override.chunk = chunk
            found.append(override)
    return found


def _fits(module: nn.Module) -> bool:
    """A norm beside the linear layer, and a forward of two tensors."""
    others = [child for child in module.children() if not is_linear(child)]
    norms = [child for child in others if "norm" in type(child).__name__.lower()]
    names = list(inspect.signature(type(module).forward).parameters)
    return len(norms) == 1 and len(names) == 3 and all(c in norms or isinstance(c, nn.Dropout) for c in others)


def _tokenwise(override: ChunkedProjection, out: int, inner: int) -> bool:
    module = override.module
    like = next(p for p in module.parameters() if p.is_floating_point())
    if like.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(1, 5, n, generator=generator).to(like.device, like.dtype) for n in (inner, out))
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            expected, actual = override.original(x, residual), override(x, residual)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    finally:
        for m, mode in modes.items():
            m.training = mode
    limit = 8 * torch.finfo(x.dtype).eps * expected.float().abs().max()
    return bool((expected - actual).float().abs().max() <= limit)
