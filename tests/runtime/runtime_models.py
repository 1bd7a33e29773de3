"""What the tests of all runtimes look at: one model per kind and architecture, and batches with padding on either side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from corank.factors import LowRank
from factorized import across, compressed, mixed

MODELS = {
    **{kind: lambda kind=kind: compressed(kind, layers=2) for kind in ("low_rank", "cur", "row_pivoted")},
    "column_pivoted": lambda: compressed("column_pivoted", layers=2),
    "shared": lambda: compressed("shared", layers=2),
    "across": across,
    "mixed": mixed,
    **{
        name: lambda name=name: compressed("low_rank", name)
        for name in ("llama-tied", "qwen2-bias", "gemma", "phi3-fused", "gpt2-conv1d", "opt", "bert")
    },
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")


def batches() -> dict[str, dict[str, Tensor]]:
    """Name -> inputs: one token, a batch, padding on the left and on the right."""
    ids = torch.randint(3, 60, (3, 13), generator=torch.Generator().manual_seed(0))
    left, right = torch.ones(3, 13, dtype=torch.long), torch.ones(3, 13, dtype=torch.long)
    left[0, :6], left[2, :12] = 0, 0
    right[1, 5:] = 0
    return {
        "token": {"input_ids": ids[:1, :1]},
        "batch": {"input_ids": ids},
        "left": {"input_ids": ids, "attention_mask": left},
        "right": {"input_ids": ids, "attention_mask": right},
    }


def outputs(model: Any) -> dict[str, Tensor]:
    """Logits of every batch where there is a token."""
    results = {}
    with torch.no_grad():
        for name, batch in batches().items():
            logits = model(**batch).logits
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            results[name] = logits[mask.bool()]
    return results


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    """Compare batch by batch, relative to the largest logit."""
    for name, wanted in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name] - wanted).float().abs().max() / wanted.float().abs().max()
        assert error <= tolerance, (name, float(error))


class GatedMLP(nn.Module):
    """The MLP of the Llama family from random factors."""

    def __init__(self, hidden: int, width: int, ranks: tuple[int, int, int], bias: bool = False, dtype=torch.float32):
        super().__init__()

        def layer(m: int, n: int, r: int) -> nn.Module:
            B, A = torch.randn(m, r) / max(r, 1) ** 0.5, torch.randn(r, n) / n**0.5
            return LowRank(B.to(dtype), A.to(dtype)).module(torch.randn(m).to(dtype) if bias else None)

        self.gate_proj, self.up_proj = layer(width, hidden, ranks[0]), layer(width, hidden, ranks[1])
        self.down_proj = layer(hidden, width, ranks[2])
        self.act_fn = nn.SiLU()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Products(TorchDispatchMode):
    """Counts the products of matrices that are launched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))
