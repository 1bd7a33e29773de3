"""A synthetic report of the size of a real one: 30 layers, 7 roles, spectra that decay as powers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from corank.report import Report

SHAPES = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
DECAY = {"q": 1.5, "k": 1.7, "v": 0.75, "o": 0.9, "gate": 1.0, "up": 0.8, "down": 0.7}
BLOCK = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}


def curve(size: int, decay: float) -> np.ndarray:
    """Relative loss at every rank 0..size for eigenvalues i^-decay."""
    energy = np.arange(1, size + 1, dtype=np.float64) ** -decay
    tail = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
    return np.sqrt(tail / tail[0])


def build_site(layer: int, role: str, losses: np.ndarray, rank: int) -> dict:
    m, n = SHAPES[role]
    size = min(m, n)
    dense = rank * (m + n) >= m * n
    ranks = np.unique(np.linspace(0, size, 33).round().astype(int))
    return {
        "name": f"model.layers.{layer}.{BLOCK.get(role, 'mlp')}.{role}_proj",
        "role": role,
        "layer": layer,
        "shape": [m, n],
        "kind": "dense" if dense else "low_rank",
        "rank": size if dense else rank,
        "max_rank": size,
        "params": m * n if dense else rank * (m + n),
        "params_dense": m * n,
        "loss": 0.0 if dense else float(losses[rank]),
        "predicted_loss": 0.0 if dense else float(losses[rank]) * 0.98,
        "curve": [[int(r), float(losses[r])] for r in ranks],
    }


def build_report(
    *,
    keep: float = 0.8,
    method: str = "svd-llm",
    layers: int = 30,
    wiki: float = 17.2,
    talk: float = 26.1,
    seed: int = 0,
    penalty: float = 1.0,
    **overrides,
) -> Report:
    rng = np.random.default_rng(seed)
    spectra = []
    for layer in range(layers):
        depth = layer / max(1, layers - 1)
        for role, (m, n) in SHAPES.items():
            decay = DECAY[role] + 0.5 * (1 - depth) ** 2 - 0.25 * depth + 0.05 * rng.standard_normal()
            spectra.append((layer, role, curve(min(m, n), max(0.3, decay)), 1 + 0.1 * rng.standard_normal()))

    def ranks_at(level: float) -> list[int]:
        return [int(np.argmax(losses <= level * noise)) for _, _, losses, noise in spectra]

    def spent(ranks: list[int]) -> float:
        shapes = [SHAPES[role] for _, role, _, _ in spectra]
        total = sum(m * n for m, n in shapes)
        return sum(min(m * n, k * (m + n)) for (m, n), k in zip(shapes, ranks, strict=True)) / total

    low, high = 0.0, 1.0
    for _ in range(25):  # the level of loss, much the same everywhere, that meets the budget
        level = (low + high) / 2
        low, high = (level, high) if spent(ranks_at(level)) > keep else (low, level)
    sites = [build_site(s[0], s[1], s[2], k) for s, k in zip(spectra, ranks_at(high), strict=True)]
    before = sum(s["params_dense"] for s in sites)
    after = sum(s["params"] for s in sites)
    rest = 28_348_416
    kept = after / before
    fields = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "method": method,
        "corank": "0.1.0",
        "parameters": {"target": "dense"},
        "budget": {"keep": keep, "scope": "sites"},
        "accounting": {
            "sites": {"dense": before, "compressed": after},
            "model": {"dense": before + rest, "compressed": after + rest},
            "bytes": {"dense": 2 * (before + rest), "compressed": 2 * (after + rest) + 9000},
            "flops_per_token": {"dense": 2 * (before + rest), "compressed": 2 * (after + rest)},
            "break_even": {"q, o": 288, "k, v": 144, "gate, up, down": 418},
        },
        "sites": sites,
        "stages": {"calibrate": 41.2, "factorize": 63.9, "save": 0.8},
        "peak_memory_bytes": 1_734_000_000,
        "seed": 0,
        "data": {"source": "wikitext-2 train", "sha256": "9f" * 32, "tokens": 131072},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "evaluation": {
            "dense": {"wikitext2": wiki, "earnings21": {"value": talk, "stderr": 0.01, "windows": 64}},
            "compressed": {
                "wikitext2": wiki * math.exp(2.2 * (1 - kept) * penalty),
                "earnings21": {
                    "value": talk * math.exp(3.1 * (1 - kept) * penalty),
                    "stderr": 0.02,
                    "windows": 64,
                },
            },
        },
        "generation": {
            "prompt": "The capital of France is",
            "dense": " Paris, and the river that runs through it is the Seine.",
            "compressed": " Paris. The city is known for its <b>art</b> & its river, the Seine.",
        },
        "speed": [
            {
                "model": name,
                "batch": batch,
                "prefill_tokens_per_s": 880.0 * grown * batch**0.1,
                "prefill_ratio": grown,
                "prefill_ratio_min": grown * 0.97 if grown != 1 else 1.0,
                "prefill_ratio_max": grown * 1.04 if grown != 1 else 1.0,
                "prefill_bound": 0.61,
                "decode_tokens_per_s": 21.5 * grown * batch,
                "decode_ratio": grown,
                "decode_ratio_min": grown * 0.95 if grown != 1 else 1.0,
                "decode_ratio_max": grown * 1.06 if grown != 1 else 1.0,
                "decode_bound": 0.34,
                "weight_bytes": 269_000_000 / grown,
                "decode_flops_per_token": 2.7e8 / grown,
            }
            for batch in (1, 8)
            for name, grown in (("dense", 1.0), (method, 1.17))
        ],
        "warnings": ["3 sites stay dense: their factors would not be smaller."],
    }
    return Report(**(fields | overrides))


@pytest.fixture(scope="session")
def make_report():
    return build_report


@pytest.fixture(scope="session")
def report() -> Report:
    return build_report()


@pytest.fixture(scope="session")
def reports() -> list[Report]:
    return [
        build_report(keep=keep, method=method, penalty=penalty, layers=6)
        for method, penalty in (("svd", 3.0), ("asvd", 1.7), ("svd-llm", 1.0))
        for keep in (0.9, 0.8, 0.6)
    ]
