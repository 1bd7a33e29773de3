"""What a compressed model is like to use: tokens/s in PyTorch and ONNX Runtime, time to load, memory and time to make.

    python -m benchmarks artefact
    python -m benchmarks artefact --quick          # everything once at toy sizes: does it run? no numbers to quote
    python -m benchmarks artefact --parts speed,load --hidden 256 --layers 2

* speed: forward passes of a random Llama made on the spot, dense and compressed, in PyTorch and in ONNX Runtime, all four
  interleaved repeat by repeat on the same tokens, float32. Batch 1 with 1 token reads every weight for one token, as decoding
  does; longer ones are prefill. Ratios are medians of paired ratios, with their extremes.
* load: `corank.load` of the two directories from the page cache, interleaved; also without checking the digests.
* memory: peak resident memory of compressing random models of 1, 2 and 4 times a size, each in a fresh process. Blocks are
  all of one size, so what grows is what is not streamed.
* processes: seconds that `corank.compress` takes in one process of one thread, in two of one thread each under torchrun, and
  in one of two threads, interleaved. Starting Python is not counted. The mean over the sites of the predicted loss is
  beside it: it has to be the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import corank
from benchmarks.hardware import hardware
from benchmarks.memory import child, write_model
from corank import checkpoint
from corank.jsonfile import read_json, write_json
from corank.serve.export import Logits, export
from corank.serve.onnx import session

PARTS = ("speed", "load", "memory", "processes")
Timed = dict[str, list[float]]

SHARED = """
import json, os, statistics, sys, time
import torch
import torch.distributed as dist
import corank
source, out, method, samples, length = sys.argv[1:]
several = int(os.environ["WORLD_SIZE"]) > 1
if several:
    dist.init_process_group("gloo")
start = time.perf_counter()
report = corank.compress(source, method, keep=0.8, out=out, samples=int(samples), length=int(length), batch=1)
seconds = time.perf_counter() - start
if os.environ["RANK"] == "0":
    loss = statistics.fmean(row["predicted_loss"] for row in report.sites)
    print(json.dumps({"seconds": seconds, "loss": loss, "stages": dict(report.stages), "peak": report.peak_memory_bytes}))
if several:
    dist.destroy_process_group()
"""

#: processes, threads of each
CREWS = {"1 process": (1, 1), "2 processes": (2, 1), "1 process, 2 threads": (1, 2)}


def write_llama(folder: Path, hidden: int, layers: int) -> int:
    """A random Llama with a tokenizer, in float32; returns its parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab={chr(c): c - 32 for c in range(32, 127)}, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def interleaved(contenders: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> Timed:
    """Seconds of each contender, in turns that begin with another one each time."""
    names = list(contenders)
    seconds: Timed = {name: [] for name in names}
    for repeat in range(warmup + repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            contenders[name]()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(first: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as fast the other one is: the median of paired ratios, and their extremes."""
    paired = [a / b for a, b in zip(first, other, strict=True)]
    return {"median": statistics.median(paired), "min": min(paired), "max": max(paired)}


@torch.no_grad()
def speed(dense: Path, small: Path, work: Path, shapes: Sequence[tuple[int, int]], repeats: int) -> dict[str, Any]:
    """Tokens/s of the four contenders."""
    exports = {name: export(path, "onnx", work / f"{name}-onnx") for name, path in (("dense", dense), ("small", small))}
    runs: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {}
    for name, path in (("dense", dense), ("small", small)):
        runs[f"torch {name}"] = Logits(checkpoint.load(path, dtype=torch.float32)[0]).eval()
        graph = session(work / f"{name}-onnx" / "model.onnx")
        runs[f"onnxruntime {name}"] = lambda ids, mask, graph=graph: graph.run(
            None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        )
    rows = []
    for batch, length in shapes:
        ids = torch.randint(8192, (batch, length), generator=torch.Generator().manual_seed(batch * length))
        mask = torch.ones_like(ids)
        turns = {n: partial(run, ids, mask) for n, run in runs.items()}
        seconds = interleaved(turns, repeats)
        row: dict[str, Any] = {"batch": batch, "length": length}
        for name, spent in seconds.items():
            rates = [batch * length / s for s in spent]
            row[name] = {"tokens_per_s": statistics.median(rates), "min": min(rates), "max": max(rates)}
        for engine in ("torch", "onnxruntime"):
            row[f"{engine} small to dense"] = ratios(seconds[f"{engine} dense"], seconds[f"{engine} small"])
        for name in ("dense", "small"):
            row[f"{name} onnxruntime to torch"] = ratios(seconds[f"torch {name}"], seconds[f"onnxruntime {name}"])
        rows.append(row)
    kept = ("parameters", "initializers", "optimized", "copied", "densified", "difference", "magnitude")
    return {
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "exports": {n: {k: e.to_json()[k] for k in kept} for n, e in exports.items()},
    }


def load(dense: Path, small: Path, repeats: int) -> dict[str, Any]:
    """Seconds to load the two directories."""

    def opening(path: Path, verify: bool) -> Callable[[], None]:
        def run() -> None:
            checkpoint.load(path, verify=verify)
            gc.collect()

        return run

    seconds = interleaved(
        {"dense": opening(dense, True), "small": opening(small, True), "small unchecked": opening(small, False)},
        repeats,
    )
    return {
        "repeats": repeats,
        "bytes": {
            name: sum(f.stat().st_size for f in path.glob("*.safetensors"))
            for name, path in (("dense", dense), ("small", small))
        },
        "seconds": {n: {"median": statistics.median(s), "min": min(s), "max": max(s)} for n, s in seconds.items()},
        "small to dense": ratios(seconds["dense"], seconds["small"]),
        "small unchecked to dense": ratios(seconds["dense"], seconds["small unchecked"]),
    }


def memory(gigabytes: float, method: str, samples: int, length: int) -> dict[str, Any]:
    """Peak resident memory of compressing models of 1, 2 and 4 times a size."""
    imported = child()["imported"]
    rows = []
    for times in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model"
            source.mkdir()
            size = write_model(source, gigabytes * times)
            found = child(str(source), str(Path(folder) / "out"), method, str(samples), str(length))
        rows.append(
            {
                "times": times,
                "model_bytes": size,
                "peak_bytes": found["peak"],
                "above_import_bytes": found["peak"] - imported,
                "seconds": sum(found["stages"].values()),
            }
        )
    return {"method": method, "samples": samples, "length": length, "import_bytes": imported, "rows": rows}


def shared(script: Path, processes: int, threads: int, *arguments: str) -> dict[str, Any]:
    """Run SHARED under torchrun and read the answer of rank 0."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*torchrun, str(script), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def processes(gigabytes: float, method: str, samples: int, length: int, repeats: int) -> dict[str, Any]:
    """Seconds of compressing a model in one process and in several."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CREWS}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "model").mkdir()
        size = write_model(work / "model", gigabytes)
        (work / "shared.py").write_text(SHARED)

        def turn(name: str) -> Callable[[], None]:
            def run() -> None:
                with tempfile.TemporaryDirectory(dir=work) as out:
                    arguments = (str(work / "model"), f"{out}/out", method, str(samples), str(length))
                    found[name].append(shared(work / "shared.py", *CREWS[name], *arguments))

            return run

        interleaved({name: turn(name) for name in CREWS}, repeats, warmup=0)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
    rows = {
        name: {
            "processes": CREWS[name][0],
            "threads_each": CREWS[name][1],
            "seconds": {
                "median": statistics.median(seconds[name]),
                "min": min(seconds[name]),
                "max": max(seconds[name]),
            },
            "times as fast": ratios(seconds["1 process"], seconds[name]),
            "predicted_loss": runs[0]["loss"],
            "peak_bytes": max(run["peak"] for run in runs),
            "stages": runs[0]["stages"],
        }
        for name, runs in found.items()
    }
    about = {"model_bytes": size, "method": method, "samples": samples, "length": length, "repeats": repeats}
    return {**about, "rows": rows}


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    out = Console(width=110)
    if "speed" in result:
        found = result["speed"]
        table = Table(title="Tokens/s (median); compressed against dense in the same engine", title_justify="left")
        for head in ("Batch × length", "torch dense", "torch compressed", "", "ORT dense", "ORT compressed", ""):
            table.add_column(head, justify="right")
        for row in found["rows"]:
            cells = [f"{row['batch']} × {row['length']}"]
            for engine in ("torch", "onnxruntime"):
                ratio = row[f"{engine} small to dense"]
                cells += [f"{row[f'{engine} {name}']['tokens_per_s']:,.0f}" for name in ("dense", "small")]
                cells.append(f"× {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})")
            table.add_row(*cells)
        out.print(table)
        small = found["exports"]["small"]
        out.print(
            f"The compressed graph stores {small['initializers']:,} numbers; after optimization "
            f"{small['optimized'] - small['copied']:,} and {small['copied']:,} as a second copy of tied matrices; "
            f"multiplied out it would be {small['densified']:,}."
        )
    if "load" in result:
        found = result["load"]
        for name, seconds in found["seconds"].items():
            out.print(f"load {name}: {seconds['median']:.3f} s ({seconds['min']:.3f}–{seconds['max']:.3f})")
    if "memory" in result:
        table = Table(title=f"Peak memory of compressing ({result['memory']['method']})", title_justify="left")
        for head in ("Model", "Peak", "Above importing", "Seconds"):
            table.add_column(head, justify="right")
        for row in result["memory"]["rows"]:
            sizes = [f"{row[key] / 1e9:.2f} GB" for key in ("model_bytes", "peak_bytes", "above_import_bytes")]
            table.add_row(*sizes, f"{row['seconds']:.0f}")
        out.print(table)

    if "processes" in result:
        found = result["processes"]
        table = Table(
            title=f"Time to compress {found['model_bytes'] / 1e9:.2f} GB ({found['method']})", title_justify="left"
        )
        for head in ("", "Seconds", "Times as fast", "Peak of a process", "Predicted loss"):
            table.add_column(head, justify="right" if head else "left")
        for name, row in found["rows"].items():
            ratio = row["times as fast"]
            table.add_row(
                name,
                f"{row['seconds']['median']:.1f}",
                f"× {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
                f"{row['predicted_loss']:.9f}",
            )
        out.print(table)


#: what --quick puts in place of the defaults
QUICK = {
    "hidden": 128,
    "layers": 2,
    "shapes": "1x1,2x16",
    "repeats": 2,
    "turns": 1,
    "gigabytes": 0.02,
    "samples": 2,
    "length": 32,
    "method": "svd-llm",
    "out": "runs/artefact-quick.json",
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, store and print."""
    parser = argparse.ArgumentParser(prog="benchmarks artefact", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=768, help="width of the model to time, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--keep", type=float, default=0.5, help="of its parameters in the blocks")
    parser.add_argument("--shapes", default="1x1,1x128,8x128", help="batch x length, separated by commas")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--gigabytes",
        type=float,
        default=0.25,
        help="the smallest model of the memory part, and that of the processes part",
    )
    parser.add_argument("--method", default="svd-llm", help="of the parts memory and processes")
    parser.add_argument("--turns", type=int, default=3, help="repeats of the processes part")
    parser.add_argument("--quick", action="store_true", help="toy sizes, about a minute; written to runs/")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", default="benchmarks/results/artefact.json")
    args = parser.parse_args(arguments)
    if args.quick:  # whatever was not set otherwise
        for name, value in QUICK.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    shapes = [(int(b), int(n)) for b, n in (shape.split("x") for shape in args.shapes.split(","))]
    transformers.logging.disable_progress_bar()
    # parts that are not measured now keep what an earlier run on this machine found
    old = read_json(args.out) if Path(args.out).is_file() else {}
    result: dict[str, Any] = {**(old if old.get("hardware") == hardware() else {}), "hardware": hardware()}

    def keep(part: str, found: dict[str, Any]) -> None:
        result[part] = found
        write_json(args.out, result)

    if {"speed", "load"} & set(parts):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            parameters = write_llama(work / "dense", args.hidden, args.layers)
            report = corank.compress(work / "dense", "svd", keep=args.keep, out=work / "small")
            about = {"hidden": args.hidden, "layers": args.layers, "parameters": parameters, "keep": args.keep}
            about["kept"] = report.accounting["model"]["compressed"]
            if "speed" in parts:
                keep("speed", {**about, **speed(work / "dense", work / "small", work, shapes, args.repeats)})
            if "load" in parts:
                keep("load", {**about, **load(work / "dense", work / "small", args.repeats)})
    if "memory" in parts:
        keep("memory", memory(args.gigabytes, args.method, args.samples, args.length))
    if "processes" in parts:
        keep("processes", processes(args.gigabytes, args.method, args.samples, args.length, args.turns))
    show({part: result[part] for part in parts})


if __name__ == "__main__":
    main()
