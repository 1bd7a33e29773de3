"""Ways to run the same factors, by name. Each changes a model in place; `torch` restores it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from corank.errors import unknown
from corank.runtime.attention import latent_attentions
from corank.runtime.dispatch import Table
from corank.runtime.graph import graphs
from corank.runtime.layout import turned
from corank.runtime.mlp import mlps
from corank.runtime.override import Override, install, uninstall
from corank.runtime.packed import packed_heads
from corank.runtime.projection import projections
from corank.runtime.single import singles


def torch_(model: Any) -> list[Override]:
    """Every module as its class made it."""
    return []


def chunked(model: Any, chunk: int | None = None) -> list[Override]:
    """MLPs over chunks of tokens: less memory, the same products.

    Args:
        model: the model.
        chunk: tokens at a time; None chooses by width and device.
    """
    return mlps(model, chunk)


def packed(model: Any, chunk: int | None = None, grouped: bool | None = None) -> list[Override]:
    """One product for the first factors of matrices with one input; MLPs over chunks of tokens; tall factors by columns.

    Args:
        model: the model.
        chunk: as for `chunked`.
        grouped: also the second factors together where their sizes allow it; None: on CUDA.
    """
    return [*mlps(model, chunk, ("packed",), grouped), *packed_heads(model, grouped), *turned(model)]


def graph(model: Any, backend: Any = None, chunk: int | None = None, grouped: bool | None = None) -> list[Override]:
    """Packed, and generation with a static cache, every step one compiled graph, which a GPU replays with one launch.

    Args:
        model: the model.
        backend: of torch.compile; None is inductor on a GPU and eager mode on a CPU.
        chunk, grouped: as for `packed`.
    """
    return [*packed(model, chunk, grouped), *graphs(model, backend)]


def triton(model: Any, chunk: int | None = None, grouped: bool | None = None) -> list[Override]:
    """Kernels of our own where they suit; packed products, or plain ones, elsewhere.

    Args:
        model: the model.
        chunk, grouped: as for `packed`.
    """
    return [*mlps(model, chunk, ("triton", "packed"), grouped), *packed_heads(model, grouped, True), *singles(model)]


def flashsvd(model: Any, chunk: int | None = None, kernel: bool = False, least: int | None = None) -> list[Override]:
    """The memory of FlashSVD (arXiv:2508.01506): attention from latents by groups of heads, MLPs over chunks of tokens.

    Args:
        model: an encoder or a decoder.
        chunk: as for `chunked`.
        kernel: rebuild keys and values inside a kernel where it suits.
        least: tokens from which attention goes by groups of heads; None chooses by device.
    """
    return [*latent_attentions(model, kernel, least), *projections(model, chunk), *mlps(model, chunk)]


def auto(model: Any, folder: str | os.PathLike[str] | None = None) -> list[Override]:
    """For each layer and number of tokens what is measured to be fastest on this device, and never slower than `torch`.

    A layer is measured when it first meets a number of tokens (up to the next power of two), for about a quarter of a
    second; the results are kept, see `corank.runtime.dispatch.Table`.

    Args:
        model: the model.
        folder: where they are kept; None is corank's cache.
    """
    table = Table(folder)
    gpu = _on_cuda(model)
    ways = ("triton", "packed", "plain") if gpu else ("packed", "plain")
    return [*mlps(model, None, ways, table=table), *packed_heads(model, kernel=gpu, table=table), *turned(model)]


def _on_cuda(model: nn.Module) -> bool:
    return any(p.is_cuda for p in model.parameters())


_TIERS: dict[str, Callable[..., Iterable[Override]]] = {
    "auto": auto,
    "chunked": chunked,
    "flashsvd": flashsvd,
    "graph": graph,
    "packed": packed,
    "torch": torch_,
    "triton": triton,
}


def set_runtime(model: Any, name: str, **options: Any) -> Any:
    """Run a model in another way, in place.

    Args:
        model: any `nn.Module`; what a tier cannot treat runs as it did.
        name: one of `TIERS`.
        options: of that tier.

    Returns:
        the model.

    Raises:
        CorankError: no such runtime.
    """
    if name not in _TIERS:
        raise unknown("runtime", name, _TIERS)
    uninstall(model)
    for override in _TIERS[name](model, **options):
        install(override)
    vars(model)["_corank_runtime"] = name
    return model


def runtime_of(model: nn.Module) -> str:
    """The name given to `set_runtime`, `torch` if it was never called."""
    return vars(model).get("_corank_runtime", "torch")


#: name -> changes a model in place and returns it
TIERS: dict[str, Callable[[Any], Any]] = {name: partial(set_runtime, name=name) for name in _TIERS}
