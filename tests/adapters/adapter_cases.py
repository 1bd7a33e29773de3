"""The adapter methods as the tests use them, and a process that knows nothing but what was saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from factorized import IDS
from tiny import tiny, windows

#: label -> (method, settings); ranks fit the thin matrices of the tiny models
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "curing": ("curing", dict(rank=5)),
    "curing-data": ("curing", dict(rank=5, data="windows")),
    "curlora": ("curlora", dict(rank=5, alpha=2.0)),
    "tcurlora": ("tcurlora", dict(rank=2)),
    "tcurlora-role": ("tcurlora", dict(rank=2, grouping="role")),
    "mora": ("mora", dict(rank=2)),
    "pissa": ("pissa", dict(rank=3)),
    "pissa-minor": ("pissa", dict(rank=3, components="minor")),
    "corda": ("corda", dict(rank=3, data="windows")),
    "corda-minor": ("corda", dict(rank=3, data="windows", components="minor")),
}
STARTED = ("pissa", "pissa-minor", "corda", "corda-minor")
ARCHITECTURES = ("llama-gqa", "qwen2-bias", "gpt2-conv1d")


def attached(model: Any, case: str, **more: Any) -> Any:
    """The model with the adapters of a case."""
    from corank.adapters import attach

    method, settings = CASES[case]
    settings = {**settings, **more}
    if settings.get("data") == "windows":
        settings["data"] = windows()
    return attach(model, method, **settings)


def disturb(model: Any, scale: float = 0.05, seed: int = 0) -> None:
    """Add noise to what trains."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((scale * torch.randn(p.shape, generator=g, dtype=torch.float64)).to(p.dtype))


def expected_count(case: str, shapes: dict[str, tuple[int, int]], roles: dict[str, str]) -> int:
    """The number of trained values, by the formula of the paper, from the shapes of the adapted matrices."""
    method, settings = CASES[case]
    r = settings["rank"]
    if method in ("curing", "curlora"):
        return len(shapes) * r * r
    if method == "tcurlora":  # S r^2 a stack: as many slices in all as there are matrices
        return len(shapes) * r * r
    if method == "mora":
        return sum((int(math.sqrt((m + n) * r) + 0.5) // 2 * 2) ** 2 for m, n in shapes.values())
    return sum(r * (m + n) for m, n in shapes.values())


def read_back(places: dict[str, str], dtype: torch.dtype, out: str) -> None:
    """In a process of its own: load each adapter with PEFT, and write the logits."""
    from peft import PeftModel

    import corank.adapters  # noqa: F401  makes PEFT know the kind

    found = {}
    for label, place in places.items():
        model = PeftModel.from_pretrained(tiny(label.split("/")[0], dtype=dtype), place).eval()
        with torch.no_grad():
            found[label] = model(input_ids=IDS).logits
    torch.save(found, Path(out))
