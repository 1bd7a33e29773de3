"""The speed table: dense, dense compiled, factorized, and every runtime, interleaved, with peak memory and prediction.

    python -m benchmarks speed                     # linear layers, then whole models; hours on two cores
    python -m benchmarks speed --quick             # nine minutes at most; few layers and rounds
    python -m benchmarks speed --parts models --shapes smollm2-135m --model smollm2-135m   # with its real weights

* linears: single matrices and their two factors, at ranks as they come (`unaligned`) and rounded to 32. Several copies
  take turns, so that no cache holds them. Seconds are those of the thread, not of the clock, where one thread is used.
* chunked: one factorized MLP as a whole and over chunks of tokens: peak memory, time, and whether the bits are the same.
* models: prefill (one forward pass over the prompt, scores of the last position) and decoding (the time of the steps behind
  it) apart. Compiled rows use a static cache, the others the growing one that transformers gives them. The Llama shapes
  have few layers and a small vocabulary, so that they fit: what is compared is their blocks.

Ratios are medians of paired rounds, with their extremes. Beside every row is what the time model predicts, and the fraction
reached of what its bytes and operations alone would allow; of models also the speed-up of what is not the output matrix, whose
time is measured in the same rounds, as a share of 1 / keep. A table without its dense row is not printed.

With --minutes (quick: 9) every table has its share of the time that is left. It then makes fewer rounds, leaves out compiled rows if
compiling takes too long, and is itself left out if all else fails; each is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.allowance import Allowance, OutOfTime, within
from benchmarks.chunked import chunked
from benchmarks.hardware import hardware
from benchmarks.linears import DTYPES, LINEARS, STEP, TOKENS, linears
from benchmarks.rounds import free_threads, ratio, rounds, spread
from benchmarks.runner import decoding, head_alone, variants, warmed
from benchmarks.shapes import SHAPES, TOY, TOY_BERT, Shape, dense_model, factorized_twin
from benchmarks.speed_report import draw, show, slug
from corank.jsonfile import write_json
from corank.runtime import TIERS
from corank.timing import RUNTIMES, Device, Runtime, anatomy, drawback, measure_device, predict, this_device

PARTS = ("linears", "chunked", "models")
GPU_ONLY = {"graph", "triton"}
"""Runtimes that on a processor are others by another name; `benchmarks gpu` measures them."""
#: row -> runtime of the time model
PREDICTED: dict[str, str | Runtime] = {
    "compiled": "graph",
    # on a processor nothing is captured: packed products, and every other operation as before
    "packed": dataclasses.replace(RUNTIMES["eager"], name="eager, packed", packed=True),
}


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
    allowance: Allowance,
) -> list[dict[str, Any]]:
    """Rows of one model: every variant at every batch."""
    rows = []
    before, after = anatomy(dense), anatomy(small)
    kept = kept_inside(before, after)
    vocabulary = dense.config.vocab_size
    for i, batch in enumerate(batches):
        mine = allowance.part(1 / (len(batches) - i))
        runners = variants(dense, small, prompt + steps + 1, compiled, tiers)
        ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(batch))
        seconds: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
        with torch.no_grad():
            peaks = warmed(runners, ids, steps, mine)
            head = head_alone(dense, batch)
            works = {k: _bound(r.prefill, ids) for k, r in runners.items()} | ({"head": head} if head else {})
            seconds["prefill"] = rounds(works, repeats, allowance=mine.part(0.5))
            if runners["dense"].decodes:
                seconds["decode"] = decoding(runners, head, ids, steps, repeats, mine)
        for label in runners:
            own = 1.0 if label.startswith("dense") else kept
            row = {"model": name, "variant": label, "keep": 1.0 if label.startswith("dense") else keep, "batch": batch}
            row |= {"prompt": prompt, "dtype": device.dtype, "kept": own, "peak_bytes": peaks[label]}
            what = before if label.startswith("dense") else after
            for mode, taken in seconds.items():
                if label in taken:
                    context = prompt + (mode == "decode") * steps // 2
                    row[mode] = _against(label, taken, what, device, mode, batch, context)
                    row[mode] |= _without_head(label, taken, own)
            rows.append(row)
        del runners
    return rows


def kept_inside(before: Any, after: Any) -> float:
    """The share of the parameters of the factorized matrices that was kept: ranks are rounded, so that it is not quite `keep`."""
    small = {site.name: after.spec(site) for site in after.inside()}
    dense = {site.name: site.shape for site in before.inside()}
    kept = sum(s["rank"] * sum(dense[name]) if s else math.prod(dense[name]) for name, s in small.items())
    return kept / sum(math.prod(shape) for shape in dense.values())


def _without_head(label: str, seconds: Mapping[str, list[float]], kept: float) -> dict[str, Any]:
    """The speed-up of everything but the output matrix, and what share it is of 1 / kept."""
    head = seconds.get("head", [0.0] * len(seconds[label]))
    dense, mine = ([s - h for s, h in zip(seconds[k], head, strict=True)] for k in ("dense", label))
    if min(*dense, *mine) <= 0:  # at toy sizes the head takes as long as the rest
        return {}
    blocks = ratio(dense, mine)
    return {"blocks_speedup": blocks} | ({"of_ceiling": blocks["median"] * kept} if kept < 1 else {})


def _bound(work: Callable[[Any], None], ids: Any) -> Callable[[], None]:
    return lambda: work(ids)


def _against(
    label: str, seconds: Mapping[str, list[float]], what: Any, device: Device, mode: str, batch: int, context: int
) -> dict[str, Any]:
    runtime = PREDICTED.get(label.split()[-1], "eager")
    step = predict(what, device, batch, context, mode, runtime)
    median = statistics.median(seconds[label])
    tokens = batch * (context if mode == "prefill" else 1)
    return {
        "seconds": spread(seconds[label]),
        "rounds": len(seconds[label]),
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """What of one model is measured.

    Attributes:
        shape, layers: of the model.
        real: with the weights of `--model`.
        prompt, steps, batches: sizes.
        compiled: with the compiled rows.
        large: one of the Llama shapes, with a small vocabulary.
    """

    shape: Shape
    layers: int
    real: bool
    prompt: int
    steps: int
    batches: tuple[int, ...]
    compiled: bool
    large: bool

    @classmethod
    def of(cls, name: str, args: argparse.Namespace, quick: bool, batches: Sequence[int]) -> Setting:
        """As the options have it."""
        shape = SHAPES[name]
        large = shape.sizes["hidden_size"] > 1024
        layers = args.layers or ((1 if large else 4) if quick else (2 if large else shape.layers))
        if args.toy:
            shape, layers = (TOY_BERT if shape.encoder else TOY), 2
        prompt, steps = (8, 2) if args.toy else (64 if large or quick else 256, 4 if large or quick else 16)
        compiled = not (args.no_compile or (quick and (large or shape.encoder)))
        real = args.model is not None and not large and not shape.encoder
        sizes = (1,) if large and quick else tuple(batches)
        return cls(shape, layers, real, prompt, steps, sizes, compiled, large)

    @property
    def config(self) -> Any:
        """Of the model with random weights."""
        return self.shape.config(self.layers, 1024 if self.large else None)

    def estimate(self, device: Device, repeats: int) -> float:
        """Seconds that the rounds should take, by the time model; compiling is not in it."""
        if self.real:
            return math.nan
        total = 0.0
        for batch in self.batches:
            total += predict(self.config, device, batch, self.prompt, "prefill").seconds * 2
            if not self.shape.encoder:
                total += predict(self.config, device, batch, self.prompt, "decode").seconds * self.steps
        return total * (repeats + 2) * (len(TIERS) - len(GPU_ONLY) + 1 + 2 * self.compiled)

    def rows(self, args: argparse.Namespace, repeats: int, allowance: Allowance) -> list[dict[str, Any]]:
        """The table of this model."""
        if self.real:
            import corank

            dense = corank.load(args.model, dtype="float32")[0].eval().requires_grad_(False)
        else:
            dense = dense_model(self.config)
        small = factorized_twin(dense, args.keep, 4 if args.toy else STEP, of=self.real)
        label = f"{self.shape.name}, {dense.config.num_hidden_layers} layers"
        return table_of_model(
            label + ("" if self.real else ", random weights"),
            dense,
            small,
            keep=args.keep,
            batches=self.batches,
            prompt=self.prompt,
            steps=self.steps,
            repeats=repeats,
            compiled=self.compiled,
            tiers=sorted(set(TIERS) - GPU_ONLY, key=lambda tier: (tier != "torch", tier)),
            device=_device(torch.float32, args.toy),
            allowance=allowance,
        )


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
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
        "--minutes", type=float, help="that all of it may take (default: as many as it takes; quick: 9)"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave the compiled rows out (quick: those of BERT and Llamas)"
    )
    parser.add_argument("--out", help="default: benchmarks/results/speed-HARDWARE.json")
    args = parser.parse_args(arguments)
    args.shapes = args.shapes or ",".join(list(SHAPES)[: -1 if args.quick or args.toy else None])
    for given, known in ((args.parts, PARTS), (args.shapes, SHAPES)):
        if wrong := set(given.split(",")) - set(known):
            parser.error(f"unknown: {', '.join(sorted(wrong))}; known: {', '.join(known)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON and a plot."""
    args = arguments_of(arguments)
    quick = args.quick or args.toy
    if args.toy:  # what a trial measures is worth nothing, and is kept nowhere
        nowhere = tempfile.TemporaryDirectory()
        os.environ["CORANK_CACHE"] = nowhere.name
    allowance = Allowance(60 * (args.minutes or 9) if args.minutes or quick else None)
    load = os.getloadavg()
    torch.set_num_threads(free_threads(args.threads))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # so that compiling ends when it is interrupted
    repeats = args.repeats or (3 if quick else 15)
    batches = [int(b) for b in (args.batches or ("1" if quick else "1,4,16,64")).split(",")]
    result: dict[str, Any] = {
        "hardware": hardware(),
        "quick": quick,
        "toy": args.toy,
        "load_before": load,
        "keep": args.keep,
        "rounds": repeats,
        "left_out": [],
    }
    tables = _tables(args, quick, repeats, batches, result)
    print(f"{len(tables)} tables, {allowance.describe()} in all", flush=True)
    for i, (name, expected, weight, work) in enumerate(tables):
        share = allowance.part(weight / sum(w for _, _, w, _ in tables[i:]))
        known = "" if math.isnan(expected) else f"about {expected:.0f} s of measuring, "
        print(f"{name}: {known}{share.describe()}", flush=True)
        try:
            with within(share):
                work(share.part(0.8))
        except OutOfTime:
            print(f"{name} left out: it takes longer than the time that is allowed; give --minutes", flush=True)
            result["left_out"].append(name)
    result["load_after"] = os.getloadavg()
    show(result, Console(width=210))
    out = args.out or (None if quick else f"benchmarks/results/speed-{slug(result['hardware']['processor'])}.json")
    if out:
        print(f"wrote {write_json(out, result)}")
        if "linears" in result:
            draw(result, Path(out).with_suffix(".png"))


Table = tuple[str, float, float, Callable[[Allowance], None]]
"""Name, estimated seconds (nan if they are not known), weight in the time allowed, and the work."""


def _tables(
    args: argparse.Namespace, quick: bool, repeats: int, batches: Sequence[int], result: dict[str, Any]
) -> list[Table]:
    """What is to be measured, in order; each puts its rows into the result."""
    tables: list[Table] = []
    if "linears" in args.parts:
        dtypes = [name for name, dtype in DTYPES.items() if not (quick and _useless(dtype))]
        sizes = ((64, 64), (128, 64)) if args.toy else LINEARS[:1] if quick else LINEARS

        def of_linears(allowance: Allowance) -> None:
            found = {DTYPES[name]: _device(DTYPES[name], args.toy) for name in dtypes}
            result["device"] = [device.to_json() for device in found.values()]
            result["linears"] = linears(sizes, dtypes, TOKENS, repeats, found.__getitem__, allowance)

        tables.append(("linears", math.nan, 1.0, of_linears))
    if "chunked" in args.parts:

        def of_chunks(allowance: Allowance) -> None:
            result["chunked"] = chunked(repeats, allowance, args.toy)

        tables.append(("chunked", math.nan, 0.5, of_chunks))
    for name in args.shapes.split(",") if "models" in args.parts else ():
        setting = Setting.of(name, args, quick, batches)

        def of_model(allowance: Allowance, setting: Setting = setting) -> None:
            rows = setting.rows(args, repeats, allowance)
            result.setdefault("models", []).extend(rows)

        seconds = setting.estimate(_device(torch.float32, args.toy), repeats)
        tables.append((name, seconds, 3.0 if setting.compiled else 1.0, of_model))
    return tables


def _useless(dtype: torch.dtype) -> bool:
    """Whether a dtype would be timed without the instructions for it; said once."""
    sentence = drawback(dtype)
    if sentence is not None:
        print(f"{sentence} Left out of a quick run.", flush=True)
    return sentence is not None


def _device(dtype: torch.dtype, toy: bool) -> Device:
    """This machine's processor; at toy sizes measured badly, but in no time."""
    return measure_device("cpu", dtype, size=64) if toy else this_device("cpu", dtype)


if __name__ == "__main__":
    main()
