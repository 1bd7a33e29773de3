"""Everything a GPU should measure, in one go: figures of the device, matrices, models, memory, and compression.

    python -m benchmarks gpu                   # on a GPU; about twenty minutes, the file is rewritten after every part
    python -m benchmarks gpu --minutes 8 --parts device,linears,decode
    python -m benchmarks gpu --dry-run         # on the CPU with toy sizes: does every part run? nothing to quote

* device: bandwidth, peak, cost of a launch alone (a chain of empty kernels in a CUDA graph) and queued by the host, quantum.
* linears: one matrix and its factors. The calls rotate over the weights of many layers, more than the L2 holds, inside one
  CUDA graph between two CUDA events. Median, 10th and 90th percentile; GB/s and TFLOP/s beside the device's own.
* decode: a whole step of Llama-3.1-8B and Llama-2-7B shapes with random weights and a static cache, captured in a CUDA graph:
  dense and factorized, plain, compiled, packed, in every runtime there is. Dense compiled is what they are compared with.
* generate: tokens of `model.generate`, as a user calls it, plain and with the runtime `graph`.
* prefill: the same models on prompts.
* memory: peak of activations of a BERT-base shape in every runtime.
* compress: CURing's job on the shape of Llama-3.1-8B (`benchmarks compress-speed`).

A part that fails is recorded with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.hardware import hardware
from benchmarks.shapes import SHAPES, TOY, TOY_BERT, Shape, dense_model, factorized_twin, own_copy, shared_copy
from benchmarks.speed_report import slug
from benchmarks.stopwatch import Bench
from corank.jsonfile import write_json
from corank.runtime import TIERS
from corank.runtime.peak import peak_activation
from corank.timing import anatomy, matrix_seconds, predict

PARTS = ("device", "linears", "decode", "generate", "prefill", "memory", "compress")
LINEARS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
KEEPS = (0.8, 0.6, 0.5)
TOKENS = (1, 16, 64, 2048)
BATCHES = (1, 4, 16, 64)
L2_BYTES = 1 << 27
STEPS = 16
"""Room for steps behind the context in a static cache: attention reads it at every step, so it is small."""


def linears(bench: Bench) -> list[dict[str, Any]]:
    """Single matrices."""
    rows = []
    device, step = bench.figures(), 4 if bench.dry else 64
    for m, n in ((64, 64), (128, 32)) if bench.dry else LINEARS:
        count = 2 if bench.dry else max(16, L2_BYTES // (m * n * 2))
        for tokens in (1, 4) if bench.dry else TOKENS:
            if bench.late:
                return rows
            x = torch.randn(tokens, n, device=bench.device).to(bench.dtype)
            sizes: dict[str, int | None] = {"dense": None}
            sizes |= {f"keep {k}": int(k * m * n / (m + n)) // step * step for k in KEEPS}
            runs: dict[str, Callable[[], Any]] = {}
            for label, rank in sizes.items():
                layers = [_matrices(bench, m, n, rank) for _ in range(count)]
                runs[label] = bench.captured(_chain(x, layers, lambda x, pair: _apply(x, pair)))
                if rank is not None and (kernel := _kernel()) is not None and tokens <= 64:
                    runs[f"{label}, kernel"] = bench.captured(
                        _chain(x, layers, lambda x, p, k=kernel: k(x, p[0], p[1]))
                    )
            found = bench.turns(runs)
            for label, taken in found.items():
                rank = sizes[label.split(",")[0]]
                each = taken["median"] / count
                moved = device.itemsize * ((m * n if rank is None else rank * (m + n)) + tokens * (m + n))
                flops = 2 * tokens * (m * n if rank is None else rank * (m + n))
                rows.append(
                    {
                        "shape": [m, n],
                        "tokens": tokens,
                        "variant": label,
                        "rank": rank,
                        "seconds": {k: v / count for k, v in taken.items()},
                        "speedup": found["dense"]["median"] / taken["median"],
                        "bytes_per_s": moved / each,
                        "flops_per_s": flops / each,
                        "predicted_seconds": matrix_seconds((m, n), rank, device, tokens),
                    }
                )
            del runs
            bench.free()
    return rows


def _matrices(bench: Bench, m: int, n: int, rank: int | None) -> tuple[torch.Tensor, ...]:
    sizes = [(m, n)] if rank is None else [(rank, n), (m, rank)]
    return tuple((torch.randn(size, device=bench.device) / 64).to(bench.dtype) for size in sizes)


def _chain(x: torch.Tensor, layers: Sequence[Any], apply: Callable[[torch.Tensor, Any], Any]) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return [apply(x, layer) for layer in layers][-1]

    return run


def _apply(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    for W in matrices:
        x = F.linear(x, W)
    return x


def _kernel() -> Callable[..., torch.Tensor] | None:
    """The fused low-rank product of this package, if this installation has it."""
    try:
        from corank.kernels import lowrank_linear
    except ImportError:
        return None
    return lowrank_linear if callable(lowrank_linear) else None


def _dense(bench: Bench, shape: Shape) -> Any:
    return dense_model((TOY if bench.dry else shape).config(), bench.device, bench.dtype)


def _twin(bench: Bench, dense: Any, keep: float) -> Any:
    return factorized_twin(dense, keep, 4 if bench.dry else 64)


class Step:
    """One decoding step of a model behind a static cache that several models share, as a callable without arguments.

    Args:
        model: in eval mode, compiled or not.
        cache: with `context` tokens in it.
        words: size of the vocabulary.
        batch, context: sequences, and tokens that are in the cache already.
        device: where.
    """

    def __init__(self, model: Any, cache: Any, words: int, batch: int, context: int, device: str) -> None:
        self.model, self.cache = model, cache
        self.token = torch.randint(words, (batch, 1), device=device)
        self.at = torch.full((batch, 1), context, device=device)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return self.model(
            input_ids=self.token, position_ids=self.at, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits


def _compiles(bench: Bench, shape: Shape) -> bool:
    return not bench.dry and shape is SHAPES["llama-3.1-8b"]


def rewound(cache: Any, context: int) -> None:
    """Let a static cache hold so many tokens again."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.cumulative_length.fill_(context)


def decode(bench: Bench) -> list[dict[str, Any]]:
    """Decoding steps of whole models. One share at a time: the weights of all would not fit."""
    rows = []
    for shape in [TOY] if bench.dry else [SHAPES["llama-3.1-8b"], SHAPES["llama-2-7b"]]:
        dense = _dense(bench, shape)
        # compiling takes a minute: once for the dense model, and only of the first shape
        compiled = torch.compile(shared_copy(dense), dynamic=False) if _compiles(bench, shape) else None
        for keep in KEEPS:
            twin = _twin(bench, dense, keep)
            for batch in (1, 2) if bench.dry else BATCHES:
                for context in (0, 8) if bench.dry else (0, 2048):
                    if bench.late:
                        return rows
                    rows += _decode_rows(bench, shape, dense, keep, twin, batch, context, compiled)
                    bench.free()
            del twin
        del dense
        bench.free()
    return rows


def _decode_rows(
    bench: Bench, shape: Shape, dense: Any, keep: float, twin: Any, batch: int, context: int, compiled: Any
) -> list[dict[str, Any]]:
    from transformers import StaticCache

    cache = StaticCache(config=dense.config, max_cache_len=context + STEPS)
    if context:
        prompt = torch.randint(dense.config.vocab_size, (batch, context), device=bench.device)
        with torch.no_grad():
            dense(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        del prompt
    made: dict[str, tuple[Any, str, Callable[[], Any]]] = {}
    rows: list[dict[str, Any]] = []
    here = {"model": shape.name, "keep": keep, "batch": batch, "context": context}

    def add(label: str, model: Any, runtime: str, call: Any = None, *, graph: bool = True) -> None:
        try:
            rewound(cache, context)
            with torch.no_grad():
                step = Step(call or model, cache, dense.config.vocab_size, batch, context, bench.device)
                made[label] = (model, runtime, bench.captured(step) if graph else step)
        except Exception as error:  # a runtime that cannot be captured must not end the others
            rows.append({**here, "variant": label, "error": f"{type(error).__name__}: {str(error)[:200]}"})

    add("dense eager", dense, "eager", graph=False)
    add("dense graph", dense, "graph")
    add("factorized eager", twin, "eager", graph=False)
    add("factorized graph", twin, "graph")
    for tier in sorted(set(TIERS) - {"torch", "graph"}):  # every step here is captured already
        runtime = tier if tier in ("packed", "triton") else "graph"
        add(f"factorized {tier} graph", TIERS[tier](own_copy(twin)), runtime)
    if compiled is not None and batch == 1 and context == 0:
        add("dense compiled", dense, "graph", compiled)
        add("factorized compiled", twin, "graph", torch.compile(shared_copy(twin), dynamic=False))
    work = {label: run for label, (_, _, run) in made.items()}
    found = bench.turns(work, before=lambda: rewound(cache, context))
    best_dense = min((t["median"] for label, t in found.items() if label.startswith("dense")), default=float("nan"))
    for label, taken in found.items():
        model, runtime, _ = made[label]
        step = predict(anatomy(model), bench.figures(), batch, context, "decode", runtime)
        rows.append(
            {
                **here,
                "variant": label,
                "seconds": taken,
                "speedup_over_best_dense": best_dense / taken["median"],
                "predicted_seconds": step.seconds,
                "fraction_of_floor": step.floor / taken["median"],
            }
        )
    return rows


@torch.no_grad()
def generate(bench: Bench) -> list[dict[str, Any]]:
    """What a user calls: seconds of a token from `generate`, the prompt's own time taken off, greedy and without an end."""
    rows = []
    shape = TOY if bench.dry else SHAPES["llama-3.1-8b"]
    dense = _dense(bench, shape)
    few, many = (1, 3) if bench.dry else (1, 65)
    small = _twin(bench, dense, 0.5)
    models = {"dense": dense, "dense graph": TIERS["graph"](own_copy(dense)), "keep 0.5": small}
    models["keep 0.5 graph"] = TIERS["graph"](own_copy(small))
    ids = torch.randint(dense.config.vocab_size, (1, 8 if bench.dry else 512), device=bench.device)
    for label, model in models.items():
        if bench.late:
            return rows
        spent = {}
        for tokens in (few, many):
            run = _generation(model, ids, tokens)
            for _ in range(3):
                run()
            spent[tokens] = statistics.median([bench.seconds(run) for _ in range(3 if bench.dry else 10)])
        each = (spent[many] - spent[few]) / (many - few)
        rows.append({"model": shape.name, "variant": label, "seconds_per_token": each, "prompt": ids.shape[1]})
    return rows


def _generation(model: Any, ids: torch.Tensor, tokens: int) -> Callable[[], Any]:
    mask = torch.ones_like(ids)
    return lambda: model.generate(
        input_ids=ids,
        attention_mask=mask,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


@torch.no_grad()
def prefill(bench: Bench) -> list[dict[str, Any]]:
    """Prompts: dense, compiled, factorized, every runtime."""
    rows = []
    shape = TOY if bench.dry else SHAPES["llama-3.1-8b"]
    dense = _dense(bench, shape)
    compiled = torch.compile(shared_copy(dense), dynamic=False) if _compiles(bench, shape) else None
    for keep in KEEPS:
        twin = _twin(bench, dense, keep)
        for batch, length in ((1, 8), (2, 8)) if bench.dry else ((1, 512), (1, 2048), (8, 2048)):
            if bench.late:
                return rows
            ids = torch.randint(dense.config.vocab_size, (batch, length), device=bench.device)
            models: dict[str, Any] = {"dense": dense}
            models |= {f"factorized {t}": TIERS[t](own_copy(twin)) for t in TIERS if t != "graph"}
            if compiled is not None and (batch, length) == (1, 2048):
                models["dense compiled"] = compiled
                models["factorized compiled"] = torch.compile(shared_copy(twin), dynamic=False)
            runs = {label: _forward(model, ids) for label, model in models.items()}
            found = bench.turns(runs, None if bench.dry else 10)
            best_dense = min(t["median"] for label, t in found.items() if label.startswith("dense"))
            for label, taken in found.items():
                peak = peak_activation(runs[label], bench.device)
                row = {"model": shape.name, "keep": keep, "variant": label, "batch": batch, "length": length}
                row |= {"seconds": taken, "peak_bytes": peak}
                rows.append({**row, "speedup_over_best_dense": best_dense / taken["median"]})
            del models, runs
            bench.free()
    return rows


def _forward(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return run


@torch.no_grad()
def memory(bench: Bench) -> list[dict[str, Any]]:
    """FlashSVD's question: activations of an encoder, and whether less of them costs time."""
    rows = []
    shape = TOY_BERT if bench.dry else SHAPES["bert-base"]
    dense = dense_model(shape.config(), bench.device, torch.float32 if bench.dry else torch.float16)
    small = factorized_twin(dense, 0.5, 4 if bench.dry else 64)
    for batch, length in ((2, 8),) if bench.dry else ((2, 4096), (16, 1024), (64, 512), (32, 128)):
        ids = torch.randint(dense.config.vocab_size, (batch, length), device=bench.device)
        models = {"dense": dense} | {f"factorized {tier}": TIERS[tier](own_copy(small)) for tier in TIERS}
        runs = {label: _encode(model, ids) for label, model in models.items()}
        found = bench.turns(runs, None if bench.dry else 10)
        for label, taken in found.items():
            peak = peak_activation(runs[label], bench.device)
            rows.append({"variant": label, "batch": batch, "length": length, "seconds": taken, "peak_bytes": peak})
    return rows


def _encode(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(input_ids=ids)


def compress(bench: Bench) -> dict[str, Any]:
    """Compression on this device."""
    from benchmarks.compress_speed import curing

    if bench.dry:
        return curing(TOY, layers=3, samples=4, length=16, device="cpu", rank=8)
    return curing(SHAPES["llama-3.1-8b"], layers=32, samples=128, length=128, device="cuda", rank=256)


def main(arguments: list[str] | None = None) -> None:
    """Run the parts and write JSON after each."""
    parser = argparse.ArgumentParser(prog="benchmarks gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=25.0, help="no measurement starts after this")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with toy sizes")
    parser.add_argument("--out", help="default: benchmarks/results/speed-GPU.json; a dry run writes nothing without it")
    args = parser.parse_args(arguments)
    if wrong := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(wrong))}; known: {', '.join(PARTS)}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("this machine has no GPU; --dry-run tries every part on the CPU")
    if args.dry_run:  # what a trial measures is worth nothing, and is kept nowhere
        nowhere = tempfile.TemporaryDirectory()
        os.environ["CORANK_CACHE"] = nowhere.name
    bench = Bench(args.dry_run, args.minutes)
    result: dict[str, Any] = {"hardware": hardware(), "dry_run": args.dry_run, "dtype": str(bench.dtype)[6:]}
    out = Path(args.out) if args.out else None
    if out is None and not args.dry_run:
        out = Path(f"benchmarks/results/speed-{slug(torch.cuda.get_device_name())}.json")
    work: dict[str, Callable[[], Any]] = {
        "device": lambda: bench.figures().to_json(),
        "linears": lambda: linears(bench),
        "decode": lambda: decode(bench),
        "generate": lambda: generate(bench),
        "prefill": lambda: prefill(bench),
        "memory": lambda: memory(bench),
        "compress": lambda: compress(bench),
    }
    failed = []
    for part in args.parts.split(","):
        started = time.perf_counter()
        try:
            if bench.late:
                raise TimeoutError(f"no time was left for {part}; give more --minutes or fewer --parts")
            result[part] = work[part]()
        except Exception as error:  # what has been measured must not be lost
            failed.append(part)
            result[part] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        bench.free()
        print(f"{part}: {time.perf_counter() - started:.1f} s" + (" FAILED" if part in failed else ""), flush=True)
        if out is not None:
            write_json(out, result)
    if failed and args.dry_run:
        raise SystemExit(result[failed[0]]["trace"])
    if out is not None:
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
