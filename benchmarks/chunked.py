"""A factorized MLP as a whole and over chunks of tokens: peak memory and time beside the dense one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.allowance import Allowance
from benchmarks.rounds import ratio, rounds, spread
from corank.factors import LowRank, replace
from corank.runtime.forms import form_of
from corank.runtime.mlp import MLP
from corank.runtime.override import install
from corank.runtime.peak import peak_activation

#: hidden size, intermediate size, rank, tokens
SIZES = (256, 1024, 96, 2048)
CHUNKS = (512, 128)


def mlp_of(hidden: int, width: int, rank: int | None) -> Any:
    """A Llama's MLP with random weights, of factors if a rank is given."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=width, num_attention_heads=4)
    mlp = LlamaMLP(config).eval().requires_grad_(False)
    if rank is not None:
        for name, m, n in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
            B, A = torch.randn(m, rank) / rank**0.5, torch.randn(rank, n) / n**0.5
            replace(mlp, name, LowRank(B, A).module())
    return mlp


def chunked(repeats: int, allowance: Allowance, toy: bool = False) -> list[dict[str, Any]]:
    """Rows of the dense MLP, the factorized one, and the same over chunks of tokens.

    Args:
        repeats: rounds.
        allowance: fewer if this is over earlier.
        toy: small sizes: does it run?
    """
    hidden, width, rank, tokens = (16, 64, 4, 32) if toy else SIZES
    chunks = [c // 64 if toy else c for c in CHUNKS]
    torch.manual_seed(0)
    x = torch.randn(1, tokens, hidden)
    whole = mlp_of(hidden, width, rank)
    contenders = {"dense": mlp_of(hidden, width, None), "factorized": whole}
    for chunk in chunks:
        part = mlp_of(hidden, width, rank)
        part.load_state_dict(whole.state_dict())
        install(MLP(part, form_of(part), chunk))
        contenders[f"chunks of {chunk}"] = part
    with torch.no_grad():
        expected = whole(x)
        exact = {name: bool(torch.equal(mlp(x), expected)) for name, mlp in contenders.items()}
        peaks = {name: peak_activation(lambda mlp=mlp: mlp(x)) for name, mlp in contenders.items()}
        seconds = rounds(
            {name: (lambda mlp=mlp: mlp(x)) for name, mlp in contenders.items()}, repeats, allowance=allowance
        )
    label = f"MLP {hidden} to {width}, rank {rank}"
    return [
        {
            "model": label,
            "variant": name,
            "tokens": tokens,
            "peak_bytes": peaks[name],
            "peak_saved": 1 - peaks[name] / peaks["factorized"],
            "same_bits": exact[name] if name != "dense" else None,
            "seconds": spread(seconds[name]),
            "speedup": ratio(seconds["dense"], seconds[name]),
            "speedup_over_unfused": ratio(seconds["factorized"], seconds[name]),
            "rounds": len(seconds[name]),
        }
        for name in contenders
    ]
