"""How long compression takes: CURing's job on the shape of Llama-3.1-8B, and whole models by `svd-llm` and `best`.

    python -m benchmarks compress-speed              # 4 of the 32 layers of the 8B shape; the 135M shape as a whole
    python -m benchmarks compress-speed --quick      # nine minutes at most: 3 layers, few tokens; 4 layers of the 135M shape
    python -m benchmarks compress-speed --layers 32 --device cuda

The weights are random, so nothing is said of quality. Calibration (forward passes) and factorization are timed apart. Where
fewer layers were run than the model has, calibration is also given per layer, and the time of the whole model is extrapolated
from it and marked so. The published figure for CURing, 129 seconds for Llama3.1-8B, is its authors' on their own machine (one
H100; calibration and decomposition together), and no measurement of ours.

With --minutes (quick: 9) every job has its share of the time that is left, and is left out, which is said, if that is too short.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import corank
from benchmarks.allowance import Allowance, OutOfTime, within
from benchmarks.hardware import hardware
from benchmarks.rounds import free_threads
from benchmarks.shapes import SHAPES, TOY, Shape
from benchmarks.speed_report import slug
from corank.jsonfile import write_json
from corank.timing import Device, measure_device, predict, this_device

PAPER = {"seconds": 129.0, "of": "CURing, arXiv:2501.04211: Llama3.1-8B to 7.32B parameters", "ours": False}
COMPRESSED = 10
"""Layers that CURing's job compresses."""
CALIBRATION = ("calibrate", "gradients")
FACTORIZATION = ("curves", "allocate", "factorize", "probe")


def write_random(folder: Path, shape: Shape, layers: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """A model with random weights on disk, written block by block; returns its parameters inside the blocks."""
    config = shape.config(layers, vocabulary)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in tied:
            part = name.split(".")[2] if ".layers." in name else "outside"
            shards.setdefault(part, {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    places, inside, total = {}, 0, 0
    for part, shapes in shards.items():
        file = f"model-{part}.safetensors"
        tensors = {
            name: (torch.randn(s, generator=generator) * s[-1] ** -0.5 if len(s) > 1 else torch.ones(s)).to(dtype)
            for name, s in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
        inside += sum(t.numel() for t in tensors.values()) if part != "outside" else 0
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    )
    config.save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab={chr(c): c - 32 for c in range(32, 127)}, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(folder)
    return inside


def job(
    shape: Shape,
    method: str,
    layers: int,
    samples: int,
    length: int,
    device: str,
    budget: dict[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Compress a random model of a shape, and take its time apart.

    Args:
        shape: of the model.
        method: of compression.
        layers: blocks that are made and run, at most those of the shape.
        samples, length: calibration windows and tokens in each.
        device: where blocks are computed.
        budget: as `corank.compress` takes it.
        settings: of the method.
    """
    layers = min(layers, shape.layers)
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "model"
        source.mkdir()
        inside = write_random(source, shape, layers, min(shape.sizes["vocab_size"], 8192))
        started = time.perf_counter()
        report = corank.compress(
            source, method, out=Path(work) / "out", samples=samples, length=length, device=device, **budget, **settings
        )
        seconds = time.perf_counter() - started
    stages = dict(report.stages)
    compressed = [row for row in report.sites if row["kind"] != "dense"]
    touched = len({row["layer"] for row in compressed})
    calibration = sum(stages.get(name, 0.0) for name in CALIBRATION)
    factorization = sum(stages.get(name, 0.0) for name in FACTORIZATION)
    row: dict[str, Any] = {
        "shape": shape.name,
        "method": method,
        "settings": {**budget, **settings},
        "layers": layers,
        "layers_of_the_model": shape.layers,
        "parameters_in_blocks": inside,
        "samples": samples,
        "length": length,
        "device": device,
        "seconds": seconds,
        "stages": stages,
        "calibration_seconds": calibration,
        "factorization_seconds": factorization,
        "matrices": len(compressed),
        "layers_compressed": touched,
        "peak_memory_bytes": report.peak_memory_bytes,
    }
    if layers < shape.layers:
        row["extrapolated_calibration_seconds"] = calibration / layers * shape.layers
    return row


def curing(shape: Shape, layers: int, samples: int, length: int, device: str, rank: int = 256) -> dict[str, Any]:
    """CURing's own job: calibration windows through the model, then some layers' q, k and gate in columns and rows."""
    row = job(shape, "curing", layers, samples, length, device, {}, rank=rank)
    if row["layers"] < shape.layers and 0 < row["layers_compressed"] < COMPRESSED:
        each = row["factorization_seconds"] / row["layers_compressed"]
        row["extrapolated_factorization_seconds"] = each * COMPRESSED
    row["paper"] = PAPER
    return row


def estimate(shape: Shape, layers: int, tokens: int, device: Device) -> float:
    """Seconds that a forward pass of the calibration tokens should take, by the time model; factorization is not in it."""
    config = shape.config(min(layers, shape.layers), min(shape.sizes["vocab_size"], 8192))
    return predict(config, device, 1, tokens, "prefill").only("linear").seconds


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(title="Compression: seconds, calibration and factorization apart")
    heads = ("calibration", "of all layers", "factorization", "of all layers", "matrices", "all")
    for head in ("shape", "method", "layers", "tokens", *heads):
        table.add_column(head, justify="left" if head in ("shape", "method") else "right")
    for row in rows:
        whole = [_extrapolated(row, name) for name in ("calibration", "factorization")]
        table.add_row(
            row["shape"],
            row["method"],
            f"{row['layers']} of {row['layers_of_the_model']}",
            str(row["samples"] * row["length"]),
            f"{row['calibration_seconds']:.1f}",
            whole[0],
            f"{row['factorization_seconds']:.1f}",
            whole[1],
            str(row["matrices"]),
            f"{row['seconds']:.1f}",
        )
    console.print(table)
    console.print(
        f"The paper's own figure for its job: {PAPER['seconds']:.0f} s ({PAPER['of']}), on its authors' machine."
    )


def _extrapolated(row: dict[str, Any], what: str) -> str:
    seconds = row.get(f"extrapolated_{what}_seconds")
    if seconds is not None:
        return f"{seconds:.0f} (extrapolated)"
    return "measured" if row["layers"] == row["layers_of_the_model"] or what == "calibration" else "–"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks compress-speed", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few layers and tokens; nothing is written without --out")
    parser.add_argument("--toy", action="store_true", help="toy sizes: does it run? no numbers to quote")
    parser.add_argument(
        "--minutes", type=float, help="that all of it may take (default: as many as it takes; quick: 9)"
    )
    parser.add_argument("--layers", type=int, help="of the 8B shape that are run (default: 4; quick: 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="at most; never more than there are free cores")
    parser.add_argument("--jobs", default="curing,svd-llm,best", help="which of them")
    parser.add_argument("--out", help="default: benchmarks/results/compress-speed-HARDWARE.json")
    args = parser.parse_args(arguments)
    load = os.getloadavg()
    torch.set_num_threads(free_threads(args.threads))
    quick, rows, left_out = args.quick or args.toy, [], []
    allowance = Allowance(60 * (args.minutes or 9) if args.minutes or quick else None)
    jobs = args.jobs.split(",")
    if wrong := [name for name in jobs if name not in WEIGHTS]:
        parser.error(f"unknown job {wrong[0]}; known: {', '.join(WEIGHTS)}")
    device = _device(args.device, args.toy)
    print(f"{len(jobs)} jobs, {allowance.describe()} in all", flush=True)
    for i, name in enumerate(jobs):
        share = allowance.part(WEIGHTS[name] / sum(WEIGHTS[other] for other in jobs[i:]))
        shape, sizes, work = _job(name, args, quick)
        expected = estimate(shape, sizes["layers"], sizes["samples"] * sizes["length"], device)
        print(f"{name}: a pass over the tokens takes about {expected:.1f} s; {share.describe()}", flush=True)
        try:
            with within(share):
                rows.append(work())
        except OutOfTime:
            print(
                f"{name} left out: it takes longer than the time that is allowed; give --minutes or fewer --layers",
                flush=True,
            )
            left_out.append(name)
            continue
        show(rows[-1:], Console(width=140))
    found = {
        "hardware": hardware(),
        "quick": quick,
        "toy": args.toy,
        "load_before": load,
        "load_after": os.getloadavg(),
    }
    found |= {"left_out": left_out, "rows": rows}
    out = args.out or (
        None if quick else f"benchmarks/results/compress-speed-{slug(found['hardware']['processor'])}.json"
    )
    if out:
        print(f"wrote {write_json(out, found)}")


#: job -> weight in the time allowed
WEIGHTS = {"curing": 3.0, "svd-llm": 1.0, "best": 2.0}


def _job(
    name: str, args: argparse.Namespace, quick: bool
) -> tuple[Shape, dict[str, int], Callable[[], dict[str, Any]]]:
    """The shape of a job, its sizes, and the work."""
    if name == "curing":
        shape = TOY if args.toy else SHAPES["llama-3.1-8b"]
        few = {"samples": 4, "length": 64} if quick else {"samples": 128, "length": 128}
        sizes = {"layers": args.layers or (3 if quick else 4), **few}
        rank = {"rank": 4} if args.toy else {}
        return shape, sizes, lambda: curing(shape, device=args.device, **sizes, **rank)
    shape = TOY if args.toy else SHAPES["smollm2-135m"]
    # best measures gradients, for which it needs as many tokens as a matrix has outputs
    few = {"samples": 8, "length": 32 if args.toy else 256} if quick else {"samples": 64, "length": 512}
    sizes = {"layers": 4 if quick else 30, **few}
    settings = {"effort": "fast"} if name == "best" else {}
    return shape, sizes, lambda: job(shape, name, device=args.device, budget={"keep": 0.8}, **sizes, **settings)


def _device(name: str, toy: bool) -> Device:
    """What estimates are made for; at toy sizes measured badly, but in no time."""
    dtype = torch.float32 if name == "cpu" else torch.bfloat16
    return measure_device(name, dtype, size=64) if toy else this_device(name, dtype)


if __name__ == "__main__":
    main()
