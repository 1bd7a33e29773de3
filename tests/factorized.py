"""Tiny models with factors of every kind, and what one does with them in tests of training."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from corank.factors import (
    CUR,
    ColumnPivoted,
    Factors,
    LowRank,
    SharedBasis,
    TiedEmbedding,
    is_conv1d,
    packed,
    replace,
    weight_of,
    wire_tied,
)
from corank.linalg import pack
from tiny import tiny

KINDS = ("low_rank", "cur", "row_pivoted", "column_pivoted")
KINDS_AND_SHARED = (*KINDS, "shared")
IDS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))


def factors_of(kind: str, W: Tensor, k: int) -> Factors:
    """Factors of rank k of the best approximation of W (of rows and columns of W for a CUR)."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    B, A = U[:, :k] * S[:k], Vh[:k]
    if kind == "cur":
        C, R = W[:, :k].double(), W[:k].double()
        result: Factors = CUR(C, torch.linalg.pinv(C) @ W.double() @ torch.linalg.pinv(R), R)
    elif kind == "row_pivoted":
        result = packed(LowRank(B, A))
    elif kind == "column_pivoted":
        turned = pack(A.T, B.T)
        result = ColumnPivoted(turned.pivots.int(), turned.rows.T, turned.rest.T)
    else:
        result = LowRank(B, A)
    return result.astype(W.dtype)


def linears(model: nn.Module) -> dict[str, Any]:
    """Name -> every dense linear layer but the head."""
    head = model.get_output_embeddings()
    found = {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Linear) or is_conv1d(layer)}
    return {name: layer for name, layer in found.items() if layer is not head}


def compressed(
    kind: str,
    name: str = "llama-gqa",
    ranks: tuple[int, ...] = (5, 3, 4, 0),
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
) -> Any:
    """The tiny model with factors everywhere but in the head."""
    model = tiny(name, dtype=dtype)
    del next(m for m in model.modules() if isinstance(m, nn.ModuleList))[layers:]
    model.config.num_hidden_layers = layers
    if kind == "shared":
        for layer in range(model.config.num_hidden_layers):
            place = f"model.layers.{layer}"
            for group in (
                [f"{place}.self_attn.{x}_proj" for x in "qkv"],
                [f"{place}.mlp.{x}_proj" for x in ("gate", "up")],
            ):
                share(model, group, 4)
        return model
    turn = itertools.cycle(ranks)
    for site, layer in linears(model).items():
        replace(model, site, factors_of(kind, weight_of(layer), next(turn)).module(layer.bias))
    return model


def mixed(layers: int = 2) -> Any:
    """All kinds in one model: a shared basis, rank 0, a dense site, the head dense."""
    model = tiny("llama-gqa")
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    dense = linears(model)
    group = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    share(model, group, 4)
    turn, ranks = itertools.cycle(KINDS), itertools.cycle([5, 3, 6, 0, 7])
    for name, layer in dense.items():
        if name not in group and not name.endswith("1.self_attn.o_proj"):
            replace(model, name, factors_of(next(turn), weight_of(layer), next(ranks)).module(layer.bias))
    return model


def across() -> Any:
    """One basis read by layers of all blocks."""
    model = tiny("llama-gqa")
    share(model, [f"model.layers.{i}.self_attn.q_proj" for i in range(3)], 4)
    return model


def tied_in_factors() -> Any:
    """A model whose embedding looks up the factors of the head."""
    model = tiny("llama-tied")
    head = factors_of("low_rank", weight_of(model.lm_head), 12)
    embedding = TiedEmbedding((24, 64), 12, "lm_head", like=weight_of(model.lm_head))
    model.model.embed_tokens = embedding.standing_for(model.model.embed_tokens)
    replace(model, "lm_head", head.module())
    wire_tied(model)
    return model


def share(model: Any, names: list[str], k: int) -> None:
    """Give several sites one basis of rank k, the first of them being its owner."""
    weights = {name: weight_of(model.get_submodule(name)) for name in names}
    U, S, Vh = torch.linalg.svd(torch.cat(list(weights.values())), full_matrices=False)
    blocks = (U * S)[:, :k].split([len(W) for W in weights.values()])
    shared = SharedBasis(Vh[:k], dict(zip(names, blocks, strict=True)))
    for name, layer in shared.modules({n: model.get_submodule(n).bias for n in names}).items():
        replace(model, name, layer)


def logits(model: Any) -> Tensor:
    """On fixed tokens, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def loss(model: Any) -> Tensor:
    """Of predicting fixed tokens."""
    return model(input_ids=IDS, labels=IDS).loss


def step(model: Any, lr: float = 1e-2) -> None:
    """One step of gradient descent on what trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def stir(model: Any, scale: float = 0.3, seed: int = 0) -> None:
    """Give every adapter random values, as large as training might."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=g))
