"""What the processes of the tests in this folder do."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import corank
from corank.engine import gradients
from corank.model import Text
from tiny import GQA, SIZES, text, tiny, tokenizer

TEXT = Text(text(), "words")
DATA: dict[str, Any] = dict(data=TEXT, samples=7, length=16, batch=1, dtype="float64")

RARE = Text(
    ("ALPHA BETA GAMMA " * 4 + "#" + "DELTA RANK MATRIX " * 3)[:112], "as many windows as are drawn, a # in one of them"
)

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "one-shot": ("llama-gqa", dict(method="svd-llm", keep=0.7)),
    "data-free": ("llama-gqa", dict(method="svd", keep=0.7, targets=("q", "down"))),
    "anchored": ("llama-gqa", dict(method="svd-llm", keep=0.7, target="anchored")),
    "update": ("llama-gqa", dict(method="svd-llm", keep=0.7, update=True)),
    "affine": ("llama-gqa", dict(method="lord", keep=0.7)),
    "rule": ("llama-gqa", dict(method="curing", layers=1, rank=4)),
    "gradients": ("llama-gqa", dict(method="fwsvd", keep=0.7)),
    "two-sided": ("llama-gqa", dict(method="kfac-svd", keep=0.7, pack=True, allocate="lagrange", labels="sampled")),
    "angular": ("llama-gqa", dict(method="svd-llm", keep=0.7, allocate="swift-svd")),
    "shared-basis": ("llama-gqa", dict(method="basis-sharing", keep=0.7)),
    "experts": ("mixtral", dict(method="svd-llm", keep=0.6)),
    "experts-anchored": ("mixtral", dict(method="svd-llm", keep=0.6, target="anchored")),
}


def directory(name: str, folder: Path) -> Path:
    """A tiny model in float64, with a tokenizer."""
    model = mixture() if name == "mixtral" else tiny(name, dtype=torch.float64)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer().save_pretrained(folder)
    return folder


def spoilt(folder: Path) -> Path:
    """A model that knows no finite embedding of #."""
    model = tiny("llama-gqa", dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer()("#")["input_ids"][0]] = torch.inf
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def mixture() -> Any:
    """Two layers of four experts each."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 2}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **GQA, intermediate_size=20, num_local_experts=4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6.0)
    return model.double()


def compress_all(rank: int, work: str, size: str, runs: list[str]) -> None:
    """Every run of a list, from the model directories in `work` into directories named by run and size."""
    room = Path(work)
    if size != "1":  # as many rounds of the sweep for gradients as there are batches, not the same number everywhere
        gradients.ACTIVATION_BYTES = 1
    for run in runs:
        model, settings = RUNS[run]
        report = corank.compress(room / model, out=room / f"{run}-{size}", **settings, **DATA)
        (room / f"{run}-{size}-rank{rank}.json").write_text(json.dumps(report.to_json()["sites"]))


def in_memory(rank: int, work: str) -> None:
    """A model that every process holds; all of them keep the result."""
    model = tiny("qwen2-bias", dtype=torch.float64)
    out = Path(work) / "memory"
    settings = {k: v for k, v in DATA.items() if k != "dtype"}
    corank.compress(model, "svd-llm", keep=0.6, update=True, tokenizer=tokenizer(), out=out, **settings)
    torch.save(
        {n: m.dense_weight() for n, m in model.named_modules() if hasattr(m, "dense_weight")},
        Path(work) / f"memory-rank{rank}.pt",
    )


def refused(rank: int, work: str) -> None:
    """Bad input, of all processes and of one; each writes the sentences it was told."""
    room, said = Path(work), []

    def attempt(**settings: Any) -> None:
        try:
            corank.compress(**{"model": room / "llama-gqa", "out": room / "refused", "keep": 0.7, **DATA, **settings})
        except corank.CorankError as error:
            said.append(str(error))

    attempt(method="svd-llm", samples=2)  # fewer batches than processes
    attempt(method="svd-llm", keep=0.6 + rank / 10)  # not the same job
    attempt(method="svd-llm", model=room / "broken", data=RARE)  # what is not finite is in one process's share
    attempt(method="svd-llm", max_perplexity_increase="5%", keep=None)
    (room / f"refused-rank{rank}.json").write_text(json.dumps(said))


def dying(rank: int, work: str, run: str, victim: int, layer: int, stage: str) -> None:
    """A run in which one process is killed when rank 0 gets to a stage of a layer. The others must end by themselves."""
    import torch.distributed as dist

    room = Path(work)
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())

    def progress(at: int, name: str, error: float | None) -> None:
        if (at, name) == (layer, stage):
            os.kill(pids[victim], signal.SIGKILL)

    model, settings = RUNS[run]
    try:
        corank.compress(room / model, out=room / f"{run}-killed", progress=progress, **settings, **DATA)
    except corank.CorankError as error:
        (room / f"{run}-rank{rank}.txt").write_text(str(error))
