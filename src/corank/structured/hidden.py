"""Some dimensions of the residual stream less: a model of the same family with a smaller hidden size.

If nothing writes to the dimensions outside J, the norms see zeros there: with d' = |J|

    x_J / sqrt(|x|^2 / d + eps) = sqrt(d / d') x_J / sqrt(|x_J|^2 / d' + eps d / d')

so that a model with the rows and columns J alone, gains sqrt(d / d') gamma_J and the other eps computes exactly the same. A
gate g_j on what is written to j (Compresso, arXiv:2310.05015) goes into the matrices that write it. If the head is the
embedding it stays so: the embedding is multiplied by g_j, and the gain of the last norm divided by it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from corank.factors import weight_of
from corank.model.outline import Outline
from corank.structured.gated import WRITERS
from corank.structured.maps import FAMILIES
from corank.structured.narrow import put
from corank.structured.residual import CONSUMERS, check_family


def selectable(model: Any) -> bool:
    """Whether dimensions of the residual stream can be taken out of a model."""
    return model.config.get_text_config().model_type in FAMILIES and not hasattr(model, "language_model")


def step_of(config: PretrainedConfig) -> int:
    """What a hidden size has to be a multiple of: the number of heads, which some families ask for, and 8 in larger models."""
    text: Any = config.get_text_config()
    heads, d = int(text.num_attention_heads), int(text.hidden_size)
    step = math.lcm(heads, 8)
    return step if 8 * step <= d and d % step == 0 else heads


@torch.no_grad()
def select_hidden(model: Any, outline: Outline, kept: Tensor, gates: Tensor | None = None) -> None:
    """Leave some dimensions of the residual stream, in place; the configuration follows.

    Args:
        model: in memory, of one of `FAMILIES`.
        outline: where its matrices are.
        kept: J ascending, int64 [d'].
        gates: of all dimensions [d], not zero on J; None: 1.

    Raises:
        CorankError: a model of another family.
    """
    check_family(model)
    text: Any = model.config.get_text_config()
    d, width = text.hidden_size, len(kept)
    gain, eps = math.sqrt(d / width), text.rms_norm_eps * d / width
    device = model.get_input_embeddings().weight.device
    g = torch.ones(d, dtype=torch.float64) if gates is None else gates.detach().double()
    kept, g = kept.to(device), g.to(device)[kept.to(device)]
    for layer in range(outline.layers):
        block = model.get_submodule(outline.path(layer))
        sites = {s.role: outline.local(s) for s in outline.in_layer(layer)}
        for norm, roles in CONSUMERS.items():
            for role in roles:
                old: Any = block.get_submodule(sites[role])
                put(block, sites[role], weight_of(old)[:, kept], old.bias)
            _norm(block.get_submodule(norm), kept, gain, eps)
        for role in WRITERS:
            old = block.get_submodule(sites[role])
            bias = None if old.bias is None else old.bias.double()[kept] * g
            put(block, sites[role], weight_of(old).double()[kept] * g[:, None], bias)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = model.get_submodule(f"{outline.blocks.rpartition('.')[0]}.norm")
    tied = head is not None and head.weight is embedding.weight
    trains = embedding.weight.requires_grad
    embedding.weight = nn.Parameter((embedding.weight.double()[:, kept] * g).to(embedding.weight.dtype), trains)
    embedding.embedding_dim = width
    if head is not None:
        trains = head.weight.requires_grad
        head.weight = embedding.weight if tied else nn.Parameter(head.weight[:, kept].clone(), trains)
        head.in_features = width
    _norm(norm, kept, gain, eps, g if tied else None)
    text.head_dim = getattr(text, "head_dim", None) or d // text.num_attention_heads
    text.hidden_size, text.rms_norm_eps = width, eps


def _norm(norm: Any, kept: Tensor, gain: float, eps: float, divided: Tensor | None = None) -> None:
    weight = norm.weight.double()[kept] * gain
    weight = weight if divided is None else weight / divided
    norm.weight = nn.Parameter(weight.to(norm.weight.dtype), norm.weight.requires_grad)
    norm.variance_epsilon = eps
