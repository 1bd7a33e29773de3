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
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.hardware import hardware
from benchmarks.shapes import SHAPES, TOY, TOY_BERT, Shape, dense_model, factorized_twin, shared_copy
from benchmarks.speed import slug
from corank.jsonfile import write_json
from corank.runtime import TIERS
from corank.runtime.peak import peak_activation
from corank.timing import Device, anatomy, matrix_seconds, measure_device, predict

PARTS = ("device", "linears", "decode", "generate", "prefill", "memory", "compress")
LINEARS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
KEEPS = (0.8, 0.6, 0.5)
TOKENS = (1, 16, 64, 2048)
BATCHES = (1, 4, 16, 64)
L2_BYTES = 1 << 27
STEPS = 128
"""Room for the steps that are timed behind the context, in a static cache."""


class Bench:
    """Where and how to measure.

    Args:
        dry: on the CPU, at toy sizes.
        minutes: no new measurement starts after this.
    """

    def __init__(self, dry: bool, minutes: float) -> None:
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.end = time.perf_counter() + 60 * minutes
        self.rounds = 2 if dry else 30
        self.known: Device | None = None

    @property
    def late(self) -> bool:
        """Whether the time is used up."""
        return time.perf_counter() > self.end

    def figures(self) -> Device:
        """The device, measured once, never from a cache."""
        if self.known is None:
            self.known = measure_device(self.device, self.dtype, size=64 if self.dry else None)
        return self.known

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work as a CUDA graph; on the CPU as it is."""
        if self.dry:
            return work
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one run: between two CUDA events, or by the clock."""
        if self.dry:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def turns(
        self, contenders: dict[str, Callable[[], Any]], repeats: int | None = None
    ) -> dict[str, dict[str, float]]:
        """Median, 10th and 90th percentile of contenders that take turns, five rounds of warm-up left out."""
        names, spent = list(contenders), {name: [] for name in contenders}
        warm = 1 if self.dry else 5
        for i in range(warm + (repeats or self.rounds)):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                taken = self.seconds(contenders[name])
                if i >= warm:
                    spent[name].append(taken)
        return {name: quantiles(values) for name, values in spent.items()}

    def free(self) -> None:
        """Give memory back."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    at = [ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.1, 0.9)]
    return {"median": statistics.median(ordered), "p10": at[0], "p90": at[1]}


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


def _models(bench: Bench, shape: Shape) -> tuple[Any, dict[float, Any]]:
    """A dense model, and its factorized twins: those of the tables' keeps."""
    dense = dense_model((TOY if bench.dry else shape).config(), bench.device, bench.dtype)
    return dense, {k: factorized_twin(dense, k, 4 if bench.dry else 64) for k in KEEPS}


class Step:
    """One decoding step of a model with a static cache, as a callable without arguments.

    Args:
        model: in eval mode.
        batch, context: sequences, and tokens that are in the cache already.
        compiled: by torch.compile, without dynamic shapes.
    """

    def __init__(self, model: Any, batch: int, context: int, compiled: bool, device: str) -> None:
        from transformers import StaticCache

        self.model = torch.compile(model, dynamic=False) if compiled else model
        self.cache = StaticCache(config=model.config, max_cache_len=context + STEPS)
        vocabulary = model.config.vocab_size
        if context:
            prompt = torch.randint(vocabulary, (batch, context), device=device)
            model(input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = torch.randint(vocabulary, (batch, 1), device=device)
        self.at = torch.full((batch, 1), context, device=device)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        # The cache counts its positions itself, and attention reads all of it at every step: a step takes the same time
        # wherever it stands.
        return self.model(
            input_ids=self.token, position_ids=self.at, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits


def decode(bench: Bench) -> list[dict[str, Any]]:
    """Decoding steps of whole models."""
    rows = []
    shapes = [TOY] if bench.dry else [SHAPES["llama-3.1-8b"], SHAPES["llama-2-7b"]]
    for shape in shapes:
        with torch.no_grad():
            dense, twins = _models(bench, shape)
        for batch in (1, 2) if bench.dry else BATCHES:
            for context in (0, 8) if bench.dry else (0, 2048):
                if bench.late:
                    return rows
                rows += _decode_rows(bench, shape, dense, twins, batch, context)
        del dense, twins
        bench.free()
    return rows


def _decode_rows(
    bench: Bench, shape: Shape, dense: Any, twins: dict[float, Any], batch: int, context: int
) -> list[dict[str, Any]]:
    made: dict[str, tuple[Any, str, Callable[[], Any]]] = {}
    failed: dict[str, str] = {}
    compiles = not bench.dry and batch == 1

    def add(label: str, model: Any, runtime: str, *, compiled: bool = False, graph: bool = True) -> None:
        try:
            with torch.no_grad():
                step = Step(model, batch, context, compiled, bench.device)
                made[label] = (model, runtime, bench.captured(step) if graph else step)
        except Exception as error:  # a runtime that cannot be captured must not end the others
            failed[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    add("dense eager", dense, "eager", graph=False)
    add("dense graph", dense, "graph")
    if compiles:
        add("dense compiled", shared_copy(dense), "graph", compiled=True)
    for keep, twin in twins.items():
        add(f"keep {keep} eager", twin, "eager", graph=False)
        add(f"keep {keep} graph", twin, "graph")
        for tier in TIERS:
            if tier not in ("torch", "graph"):  # every step here is captured already
                runtime = tier if tier in ("packed", "triton") else "graph"
                add(f"keep {keep} {tier} graph", TIERS[tier](shared_copy(twin)), runtime)
        if compiles:
            add(f"keep {keep} packed compiled", TIERS["packed"](shared_copy(twin)), "packed", compiled=True)
    found = bench.turns({label: work for label, (_, _, work) in made.items()})
    best_dense = min((t["median"] for label, t in found.items() if label.startswith("dense")), default=float("nan"))
    rows = []
    for label, taken in found.items():
        model, runtime, _ = made[label]
        step = predict(anatomy(model), bench.figures(), batch, context, "decode", runtime)
        rows.append(
            {
                "model": "toy" if bench.dry else shape.name,
                "variant": label,
                "batch": batch,
                "context": context,
                "seconds": taken,
                "speedup_over_best_dense": best_dense / taken["median"],
                "predicted_seconds": step.seconds,
                "fraction_of_floor": step.floor / taken["median"],
            }
        )
    return rows + [
        {"model": shape.name, "variant": label, "batch": batch, "error": why} for label, why in failed.items()
    ]


@torch.no_grad()
def generate(bench: Bench) -> list[dict[str, Any]]:
    """What a user calls: seconds of a token from `generate`, the prompt's own time taken off, greedy and without an end."""
    rows = []
    shape = TOY if bench.dry else SHAPES["llama-3.1-8b"]
    dense, twins = _models(bench, shape)
    few, many = (1, 3) if bench.dry else (1, 65)
    small = twins[0.5]
    models = {"dense": dense, "dense graph": TIERS["graph"](shared_copy(dense)), "keep 0.5": small}
    models["keep 0.5 graph"] = TIERS["graph"](shared_copy(small))
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
    dense, twins = _models(bench, shape)
    for batch, length in ((1, 8), (2, 8)) if bench.dry else ((1, 512), (1, 2048), (8, 2048)):
        if bench.late:
            return rows
        ids = torch.randint(dense.config.vocab_size, (batch, length), device=bench.device)
        models: dict[str, Any] = {"dense": dense}
        if not bench.dry:
            models["dense compiled"] = torch.compile(shared_copy(dense), dynamic=False)
        for keep, twin in twins.items():
            models |= {f"keep {keep} {tier}": TIERS[tier](shared_copy(twin)) for tier in TIERS}
            if not bench.dry:
                models[f"keep {keep} compiled"] = torch.compile(shared_copy(twin), dynamic=False)
        runs = {label: _forward(model, ids) for label, model in models.items()}
        found = bench.turns(runs, None if bench.dry else 10)
        best_dense = min(t["median"] for label, t in found.items() if label.startswith("dense"))
        for label, taken in found.items():
            peak = peak_activation(runs[label], bench.device)
            row = {"model": shape.name, "variant": label, "batch": batch, "length": length, "seconds": taken}
            rows.append({**row, "peak_bytes": peak, "speedup_over_best_dense": best_dense / taken["median"]})
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
        models = {"dense": dense} | {f"factorized {tier}": TIERS[tier](shared_copy(small)) for tier in TIERS}
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
