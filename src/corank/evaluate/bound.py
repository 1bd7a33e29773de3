"""How fast this device can be: what a model reads and computes per token, and the rates nothing can beat.

A forward pass takes at least max(FLOPs / arithmetic rate, bytes of weights / bandwidth). Prefill is bound by
the
first, decoding at small batch by the second: it is why a model with fewer FLOPs need not decode faster, and
why one with fewer bytes should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from corank.timing.rates import Bound, measure_bound, synchronize

__all__ = ["Bound", "count_flops", "measure_bound", "synchronize", "weight_bytes"]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights and buffers that one forward pass reads.

    Everything is read once, whatever shares it, but for embedding tables, of which a token reads one row:
    they count only where they are also the output matrix. For a mixture of experts it is the upper bound (all
    experts).
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    ask = getattr(model, "get_output_embeddings", None)
    output = ask() if callable(ask) else None
    if output is not None:
        tables.discard(id(getattr(output, "weight", None)))
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in tables)


def count_flops(model: nn.Module, **inputs: Any) -> int:
    """FLOPs (2 per multiply-add) of the matrix products and attention of ``model(**inputs)``, counted as it
    runs.

    Masked halves of causal attention count in full.
    """
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with torch.no_grad(), counter:
        model(**inputs)
    return int(counter.get_total_flops())


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))
