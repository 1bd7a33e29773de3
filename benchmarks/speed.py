"""The speed table: dense, dense compiled, factorized, and every runtime, interleaved, with peak memory and prediction.

    python -m benchmarks speed                     # linear layers, then whole models; hours on two cores
    python -m benchmarks speed --quick             # under ten minutes; few layers and rounds
    python -m benchmarks speed --parts models --shapes smollm2-135m --model smollm2-135m   # with its real weights

* linears: single matrices and their two factors, at ranks as they come (`unaligned`) and rounded to 32. Several copies
  take turns, so that no cache holds them. Seconds are those of the thread, not of the clock, where one thread is used.
* models: prefill (one forward pass over the prompt, scores of the last position) and decoding (the time of the steps behind
  it) apart. Compiled rows use a static cache, the others the growing one that transformers gives them. The Llama shapes
  have few layers and a small vocabulary, so that they fit: what is compared is their blocks.

Ratios are medians of paired rounds, with their extremes. Beside every row is what the time model predicts, and the fraction
reached of what its bytes and operations alone would allow. A table without its dense row is not printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks.hardware import hardware
from benchmarks.rounds import free_threads, ratio, rounds, spread
from benchmarks.shapes import SHAPES, TOY, TOY_BERT, dense_model, factorized_twin, own_copy, shared_copy
from benchmarks.speed_report import draw, show, slug
from corank.errors import CorankError
from corank.jsonfile import write_json
from corank.runtime import TIERS
from corank.runtime.peak import peak_activation
from corank.timing import RUNTIMES, Device, Runtime, anatomy, matrix_seconds, measure_device, predict, this_device

PARTS = ("linears", "models")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LINEARS = ((2048, 2048), (8192, 2048))
TOKENS = (1, 16, 128)
KEEPS = (0.8, 0.5)
MANY = 64
STEP = 32
COPIES_BYTES = 1 << 27
GPU_ONLY = {"graph", "triton"}
"""Runtimes that on a processor are others by another name; `benchmarks gpu` measures them."""
#: row -> runtime of the time model
PREDICTED: dict[str, str | Runtime] = {
    "compiled": "graph",
    # on a processor nothing is captured: packed products, and every other operation as before
    "packed": dataclasses.replace(RUNTIMES["eager"], name="eager, packed", packed=True),
}


def linears(
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    tokens: Sequence[int],
    repeats: int,
    device: Callable[[Any], Device],
) -> list[dict[str, Any]]:
    """Single matrices: dense, and two factors at every keep, with ranks as they come and aligned."""
    rows = []
    for name in dtypes:
        where = device(DTYPES[name])
        for m, n in shapes:
            ranks: dict[str, int | None] = {"dense": None}
            for keep in KEEPS:
                rank = int(keep * m * n / (m + n))
                ranks[f"keep {keep}, rank {rank}"] = rank
                if rank % STEP:
                    ranks[f"keep {keep}, rank {rank // STEP * STEP}"] = rank // STEP * STEP
            weights = {label: _copies(m, n, rank, DTYPES[name]) for label, rank in ranks.items()}
            for count in tokens:
                x = torch.randn(count, n).to(DTYPES[name])
                # many tokens are bound by arithmetic, and two copies are enough
                used = {label: copies[: 2 if count >= MANY else None] for label, copies in weights.items()}
                runs = {label: _pass(x, copies) for label, copies in used.items()}
                clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
                with torch.no_grad():
                    seconds = rounds(runs, repeats, clock=clock)
                for label, rank in ranks.items():
                    each = [s / len(used[label]) for s in seconds[label]]
                    dense = [s / len(used["dense"]) for s in seconds["dense"]]
                    expected = matrix_seconds((m, n), rank, where, count)
                    rows.append(
                        {
                            "shape": [m, n],
                            "dtype": name,
                            "tokens": count,
                            "variant": label,
                            "rank": rank,
                            "kept": 1.0 if rank is None else rank * (m + n) / (m * n),
                            "aligned": rank is None or rank % STEP == 0,
                            "seconds": spread(each),
                            "speedup": ratio(dense, each),
                            "predicted_seconds": expected,
                            "predicted_speedup": matrix_seconds((m, n), None, where, count) / expected,
                        }
                    )
    return rows


def _copies(m: int, n: int, rank: int | None, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Enough copies of the matrices that no cache holds all of them; the same number at every rank."""
    count = min(max(2, COPIES_BYTES // (m * n * dtype.itemsize)), 64)
    sizes = [(m, n)] if rank is None else [(rank, n), (m, rank)]
    return [tuple((torch.randn(size) / 64).to(dtype) for size in sizes) for _ in range(count)]


def _pass(x: torch.Tensor, copies: Sequence[tuple[torch.Tensor, ...]]) -> Callable[[], None]:
    def run() -> None:
        for weights in copies:
            y = x
            for W in weights:
                y = F.linear(y, W)

    return run


class Runner:
    """One variant of a model, ready to be timed.

    Args:
        model: in eval mode.
        compiled: compile it; decoding then uses a static cache of `length` positions.
        length: prompt and new tokens together.
    """

    def __init__(self, model: Any, compiled: bool, length: int) -> None:
        self.model, self.length = model, length
        self.static = compiled and model.config.model_type != "bert"
        self.call = torch.compile(model, dynamic=False) if compiled else model
        self.decodes = model.config.model_type != "bert"
        self.cache: Any = None
        self.out: Any = None

    def prefill(self, ids: torch.Tensor) -> None:
        """One pass over the prompt."""
        if not self.decodes:
            self.call(input_ids=ids)
            return
        if self.static:
            from transformers import StaticCache

            if self.cache is None:  # one for all runs: a compiled model is compiled for it
                self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)
            self.cache.reset()
        self.out = self.call(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def decode(self, steps: int) -> None:
        """Greedy steps behind the prompt."""
        for _ in range(steps):
            token = self.out.logits[:, -1:].argmax(dim=-1)
            self.out = self.call(
                input_ids=token, past_key_values=self.out.past_key_values, use_cache=True, logits_to_keep=1
            )


def variants(dense: Any, small: Any, length: int, compiled: bool, tiers: Sequence[str]) -> dict[str, Runner]:
    """Every row of a table, the dense model first; weights are shared between rows of one model."""
    found = {"dense": Runner(dense, False, length)}
    if compiled:
        found["dense compiled"] = Runner(shared_copy(dense), True, length)
    for tier in tiers:
        try:
            model = TIERS[tier](own_copy(small))
        except CorankError as error:  # a runtime that this machine has not
            print(f"{tier} left out: {error}")
            continue
        found["factorized" if tier == "torch" else f"factorized {tier}"] = Runner(model, False, length)
    if compiled:
        found["factorized compiled"] = Runner(shared_copy(small), True, length)
    return found


def table_of_model(
    name: str,
    dense: Any,
    small: Any,
    *,
    keep: float,
    batches: Sequence[int],
    prompt: int,
    steps: int,
    repeats: int,
    compiled: bool,
    tiers: Sequence[str],
    device: Device,
) -> list[dict[str, Any]]:
    """Rows of one model: every variant at every batch."""
    rows = []
    before, after = anatomy(dense), anatomy(small)
    vocabulary = dense.config.vocab_size
    for batch in batches:
        runners = variants(dense, small, prompt + steps + 1, compiled, tiers)
        ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(batch))
        seconds: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
        with torch.no_grad():
            peaks = {label: _peaks(runner, ids) for label, runner in runners.items()}
            seconds["prefill"] = rounds({k: _bound(r.prefill, ids) for k, r in runners.items()}, repeats)
            if runners["dense"].decodes:
                seconds["decode"] = _decoding(runners, ids, steps, repeats)
        for label in runners:
            row = {"model": name, "variant": label, "keep": 1.0 if label.startswith("dense") else keep, "batch": batch}
            row |= {"prompt": prompt, "dtype": device.dtype, "peak_bytes": peaks[label]}
            what = before if label.startswith("dense") else after
            for mode, taken in seconds.items():
                if label in taken:
                    row[mode] = _against(
                        label, taken, what, device, mode, batch, prompt + (mode == "decode") * steps // 2
                    )
            rows.append(row)
        del runners
    return rows


def _bound(work: Callable[[Any], None], ids: Any) -> Callable[[], None]:
    return lambda: work(ids)


def _peaks(runner: Runner, ids: torch.Tensor) -> dict[str, int]:
    """Bytes of activations, and of the cache, alive at once; the run also warms everything up."""
    runner.prefill(ids)
    found = {"prefill": peak_activation(lambda: runner.prefill(ids))}
    if runner.decodes:
        runner.decode(1)
        found["decode"] = peak_activation(lambda: runner.decode(1))
    return found


def _decoding(runners: Mapping[str, Runner], ids: torch.Tensor, steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of one step; the prompt is not counted."""
    names, seconds = list(runners), {name: [] for name in runners}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            runners[name].prefill(ids)
            started = time.perf_counter()
            runners[name].decode(steps)
            seconds[name].append((time.perf_counter() - started) / steps)
    return seconds


def _against(
    label: str, seconds: Mapping[str, list[float]], what: Any, device: Device, mode: str, batch: int, context: int
) -> dict[str, Any]:
    runtime = PREDICTED.get(label.split()[-1], "eager")
    step = predict(what, device, batch, context, mode, runtime)
    median = statistics.median(seconds[label])
    tokens = batch * (context if mode == "prefill" else 1)
    return {
        "seconds": spread(seconds[label]),
        "tokens_per_s": tokens / median,
        "speedup": ratio(seconds["dense"], seconds[label]),
        "predicted_seconds": step.seconds,
        "fraction_of_floor": step.floor / median,
        "launches": step.launches,
        "runtime_of_prediction": step.runtime.name,
    } | (
        {"speedup_over_compiled": ratio(seconds["dense compiled"], seconds[label])}
        if "dense compiled" in seconds
        else {}
    )


def _device(dtype: torch.dtype, toy: bool) -> Device:
    """This machine's processor; at toy sizes measured badly, but in no time."""
    return measure_device("cpu", dtype, size=64) if toy else this_device("cpu", dtype)


def _model(
    name: str, args: argparse.Namespace, quick: bool, batches: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    shape = SHAPES[name]
    large = shape.sizes["hidden_size"] > 1024
    layers = args.layers or ((1 if large else 4) if quick else (2 if large else shape.layers))
    if args.toy:
        shape, layers = (TOY_BERT if shape.encoder else TOY), 2
    real = args.model is not None and not large and not shape.encoder
    if real:
        import corank

        dense = corank.load(args.model, dtype="float32")[0].eval().requires_grad_(False)
    else:
        dense = dense_model(shape.config(layers, 1024 if large else None))
    device = _device(torch.float32, args.toy)
    small = factorized_twin(dense, args.keep, 4 if args.toy else STEP, of=real)
    label = f"{shape.name}, {dense.config.num_hidden_layers} layers" + ("" if real else ", random weights")
    prompt, steps = (8, 2) if args.toy else (64 if large or quick else 256, 4 if large or quick else 16)
    return table_of_model(
        label,
        dense,
        small,
        keep=args.keep,
        batches=[1] if large and quick else batches,
        prompt=prompt,
        steps=steps,
        repeats=repeats,
        compiled=not (args.no_compile or (large and quick)),
        tiers=sorted(set(TIERS) - GPU_ONLY, key=lambda tier: (tier != "torch", tier)),
        device=device,
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON and a plot."""
    parser = argparse.ArgumentParser(prog="benchmarks speed", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, layers and batches; nothing is written without --out"
    )
    parser.add_argument("--toy", action="store_true", help="toy sizes: does it run? no numbers to quote")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--shapes", help=f"models, of {', '.join(SHAPES)} (default: all; quick: all but the last)")
    parser.add_argument("--model", help="a model whose real weights are used in place of random ones (smollm2-135m)")
    parser.add_argument("--keep", type=float, default=0.5, help="of the parameters of every matrix of the models")
    parser.add_argument("--threads", type=int, default=1, help="at most; never more than there are free cores")
    parser.add_argument("--layers", type=int, help="of every model (default: all of the small ones, 2 of the Llamas)")
    parser.add_argument("--batches", help="separated by commas (default: 1,4,16,64; quick: 1)")
    parser.add_argument("--repeats", type=int, help="rounds (default: 15; quick: 3)")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave the compiled rows out (quick: those of Llamas)"
    )
    parser.add_argument("--out", help="default: benchmarks/results/speed-HARDWARE.json")
    args = parser.parse_args(arguments)
    quick = args.quick or args.toy
    args.shapes = args.shapes or ",".join(list(SHAPES)[: -1 if quick else None])
    for given, known in ((args.parts, PARTS), (args.shapes, SHAPES)):
        if wrong := set(given.split(",")) - set(known):
            parser.error(f"unknown: {', '.join(sorted(wrong))}; known: {', '.join(known)}")
    quick = args.quick or args.toy
    if args.toy:  # what a trial measures is worth nothing, and is kept nowhere
        nowhere = tempfile.TemporaryDirectory()
        os.environ["CORANK_CACHE"] = nowhere.name
    load = os.getloadavg()
    torch.set_num_threads(free_threads(args.threads))
    repeats = args.repeats or (3 if quick else 15)
    batches = [int(b) for b in (args.batches or ("1" if quick else "1,4,16,64")).split(",")]
    result: dict[str, Any] = {
        "hardware": hardware(),
        "quick": quick,
        "toy": args.toy,
        "load_before": load,
        "keep": args.keep,
    }
    result["rounds"] = repeats
    if "linears" in args.parts:
        sizes = ((64, 64), (128, 64)) if args.toy else LINEARS[:1] if quick else LINEARS
        found = {dtype: _device(dtype, args.toy) for dtype in DTYPES.values()}
        result["linears"] = linears(sizes, list(DTYPES), TOKENS, repeats, found.__getitem__)
        result["device"] = [device.to_json() for device in found.values()]
    if "models" in args.parts:
        result["models"] = []
        for name in args.shapes.split(","):
            result["models"] += _model(name, args, quick, batches, repeats)
    result["load_after"] = os.getloadavg()
    show(result, Console(width=170))
    out = args.out or (None if quick else f"benchmarks/results/speed-{slug(result['hardware']['processor'])}.json")
    if out:
        print(f"wrote {write_json(out, result)}")
        if "linears" in result:
            draw(result, Path(out).with_suffix(".png"))


if __name__ == "__main__":
    main()
