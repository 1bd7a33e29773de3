"""compress(): the one call that does it all."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from corank import checkpoint
from corank.account import document, make_report, provenance, with_bytes
from corank.checkpoint.widths import only_narrow
from corank.engine.claim import cache_of, claim, files_key, model_key, working
from corank.engine.directory import DirectorySink, ElsewhereSink, MemorySink, copy_companions, small_files
from corank.engine.job import Job
from corank.engine.narrowing import stored_shape
from corank.engine.passes import Result, run
from corank.engine.store import torch_dtype_name
from corank.engine.world import World, device_of, joined
from corank.errors import CorankError, unknown
from corank.evaluate import PeakMemory, Perplexity, perplexity
from corank.gates.any_size import map_of
from corank.model import (
    ResidentModel,
    StreamedModel,
    Text,
    read_text,
    resolve,
)
from corank.model.streaming import NotStreamable
from corank.order import Data, Order
from corank.recipe import Recipe
from corank.report import Report
from corank.structured.driver import compress_resident, compress_streamed, folds_channels
from corank.structured.recipe import Structured

Progress = Callable[[int, str, float | None], None]
"""Called with (layer, stage, relative error or None)."""


def compress(
    model: str | Path | PreTrainedModel,
    method: str = "best",
    *,
    keep: float | str | None = None,
    remove: float | str | None = None,
    params: int | str | None = None,
    bytes: int | str | None = None,
    latency: float | str | None = None,
    latency_batch: int = 1,
    latency_tokens: int = 1,
    latency_device: str | None = None,
    max_perplexity_increase: float | str | None = None,
    heldout: str | Path | Text = "builtin-test",
    scope: str | None = None,
    out: str | Path | None = None,
    data: Data = "builtin",
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    batch: int = 8,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Compress a model.

    Args:
        model: a directory, hub id, ``.gguf`` file or alias, which is then streamed block by block from disk to `out`
            and never in memory as a whole; or a model in memory, which is changed in place.
        method: name of a registered method, see `corank.methods()`.
        keep, remove, params, bytes: the budget, exactly one of them (``keep=0.8``, ``bytes="10GiB"``); methods with a
            rank rule of their own (curing) work without one.
        latency: in place of a size: the fraction of the predicted time of the selected matrices that they may take
            (``latency=0.7``); ranks are rounded to what suits the device, and what cannot be faster stays dense.
        latency_batch, latency_tokens: the time of so many sequences with so many new tokens each: 1 (the default) is
            decoding, a longer one the prefill of a prompt.
        latency_device: where: "h200", a JSON file that describes a device, "cpu" or "cuda"; None: this machine.
        max_perplexity_increase: in place of a size: the smallest model whose perplexity on `heldout` is no more than this
            share above the dense model's (``"5%"``); needs a model on disk.
        heldout: text to judge by, not the calibration text.
        scope: what the budget is counted over, the selected "sites" or the whole "model"; None: the sites for a
            fraction, the model for a size.
        out: directory to write. For a model in memory it may be None.
        data: calibration text: a file, ``datasets:NAME``, "builtin", or a `Text`; or, for a model of anything else, a
            list of dicts of model inputs (``[{"pixel_values": x}, ...]``), each a batch.
        samples, length: calibration windows and tokens in each.
        seed: of everything random.
        batch: windows per forward pass.
        tokenizer: of a model in memory.
        device, dtype: where and in what dtype blocks are computed while streaming.
        cache: directory for statistics, shared by runs on the same model and data.
        progress: called with (layer, stage, relative error or None).
        settings: parameters of the method, and fields common to all: allocate, target, pack, ...

    Returns:
        the report. It has also been written to ``out/report.json``.

    In an initialised process group of `torch.distributed` all processes make the same call and share the work; the one of
    rank 0 writes. The result is that of a single process up to the rounding of sums in float64.

    Raises:
        CorankError: bad input; nothing has been written or overwritten. An interrupted run keeps ``<out>.partial`` and
            goes on from there when it is called again.
    """
    budget: dict[str, Any] = {"keep": keep, "remove": remove, "params": params, "bytes": bytes, "latency": latency}
    if latency is not None:
        step = {"batch": latency_batch, "tokens": latency_tokens, "device": latency_device}
        budget |= {f"latency_{name}": value for name, value in step.items()}
    if max_perplexity_increase is not None:
        from corank.quality import compress_to_quality  # it calls this function for every trial

        if any(value is not None for value in budget.values()):
            raise CorankError("Give a size or max_perplexity_increase, not both.")
        if out is None or isinstance(model, PreTrainedModel):
            raise CorankError("max_perplexity_increase needs a model on disk and out=DIRECTORY.")
        with joined() as world:
            if world.size > 1:
                raise CorankError(
                    "The search for a size runs in one process; give a size (keep=0.8), or start it without torchrun."
                )
        return compress_to_quality(
            model,
            method,
            max_perplexity_increase,
            out=out,
            heldout=heldout,
            window=length,
            cache=cache,
            data=data,
            device=device,
            dtype=dtype,
            samples=samples,
            seed=seed,
            batch=batch,
            scope=scope,
            progress=progress,
            length=length,
            **settings,
        )
    target = None if out is None else check_target(out)
    order = Order.take(method, budget, scope, settings, data, samples=samples, length=length, seed=seed, batch=batch)
    if order.recipe.heal != "none":
        from corank.healing import compress_and_heal  # it calls this function for the closed form

        given = {
            **budget,
            "scope": scope,
            "data": data,
            "samples": samples,
            "length": length,
            "seed": seed,
            "batch": batch,
        }
        where: dict[str, Any] = {"device": device, "dtype": dtype, "cache": cache, "progress": progress}
        return compress_and_heal(model, method, order, out=out, **given, **where, **settings)
    if target is None and not isinstance(model, PreTrainedModel):
        raise CorankError("Give out=DIRECTORY: a model that is read from disk is written to disk.")
    with joined() as world:
        report = progress if progress and world.first else (lambda layer, stage, error: None)
        world.same("settings", [order.identity(), batch, None if target is None else str(target)])
        alone = isinstance(order.recipe, Structured) or order.recipe.train is not None
        if alone and world.size > 1:
            raise CorankError(f"{method} works in one process; start it without torchrun.")
        if isinstance(model, PreTrainedModel):
            name = getattr(model.config, "_name_or_path", "") or type(model).__name__
            return _in_memory(model, tokenizer, name, order, target, cache, report, world)
        world.same("models", str(model))
        device = device_of(device, world)
        path = resolve(model)
        _refuse_compressed(path, order)
        trains = isinstance(order.recipe, Recipe) and order.recipe.train is not None
        try:
            source = None if trains else StreamedModel(path, device, to_dtype(dtype), example=order.example)
        except NotStreamable:
            source = None
        if source is None:
            of_text = isinstance(order.text, Text)
            whole, words = checkpoint.load(path, dtype=to_dtype(dtype), device=device, tokenizer=of_text)
            return _in_memory(whole, words, str(model), order, target, cache, report, world, companions=path)
        assert target is not None
        return _streamed(source, str(model), order, target, cache, report, world)


def _refuse_compressed(path: Path, order: Order) -> None:
    """Only what is dense can be compressed: with widths of its own in every block too, but then not narrowed again.

    Raises:
        CorankError: it is not.
    """
    section = json.loads((path / "config.json").read_text()).get("quantization_config")
    if not section:
        return
    if not only_narrow(section):
        raise CorankError(f"{path} is compressed or quantized already; start from the dense model.")
    if isinstance(order.recipe, Structured):
        raise CorankError(
            f"The blocks of {path} have been narrowed already; start from the dense model, narrow it with uniform=true, or "
            "go on with a method that factorizes matrices, such as best."
        )


def load(
    model: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    runtime: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer, dense or compressed.

    Args:
        model: a directory, hub id, ``.gguf`` file or alias such as ``smollm2-135m``.
        dtype: of the weights; None: as stored.
        device: where to put it.
        runtime: how it is run, see `corank.runtime`: "auto", "packed", "chunked", ...; None: the modules as they are.

    Returns:
        (model, tokenizer). A compressed model has been verified against its fingerprint.

    Raises:
        CorankError: no such model or runtime, damaged or truncated files, a format of a newer corank.
    """
    if runtime is not None:
        from corank.runtime import TIERS, set_runtime  # not needed for compressing

        if runtime not in TIERS:
            raise unknown("runtime", runtime, TIERS)
    loaded, tokenizer = checkpoint.load(resolve(model), dtype=to_dtype(dtype), device=device)
    return loaded if runtime is None else set_runtime(loaded, runtime), tokenizer


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | Path | Text = "builtin-test",
    *,
    window: int = 512,
    max_windows: int | None = None,
    bos: bool | None = None,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity under the fixed protocol of `corank.evaluate.perplexity`.

    Args:
        model, tokenizer: as `load` gives them.
        text: a `Text`, the name of a built-in text, a file, or ``datasets:NAME`` (a plain string is a source, not text).
        window, max_windows, bos, batch: see `corank.evaluate.perplexity.perplexity`; bos None: what the tokenizer does.

    Raises:
        CorankError: the text cannot be read or is too short.
    """
    source = text if isinstance(text, Text) else read_text(text)
    return perplexity(
        model,
        tokenizer,
        source.text,
        window=window,
        max_windows=max_windows,
        bos="auto" if bos is None else bos,
        batch_size=batch,
        progress=progress,
    )


def check_target(out: str | Path) -> Path:
    """The output directory, which must not exist or be empty.

    Raises:
        CorankError: it holds something; nothing is overwritten.
    """
    path = Path(out).expanduser()
    if path.exists() and not path.is_dir():
        raise CorankError(f"{path} is a file; give a directory to write.")
    if path.is_dir() and any(path.iterdir()):
        raise CorankError(f"{path} is not empty; give a new directory, or delete it first.")
    return path


def to_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name.

    Raises:
        CorankError: it is not one of floating point.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CorankError(f"{dtype!r} is not a floating-point dtype; use float32, bfloat16 or float16.")
    return found


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises:
        CorankError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorankError(f"{path} has no usable tokenizer, which calibration needs ({reason}).") from None


def _in_memory(
    model: PreTrainedModel,
    tokenizer: Any,
    name: str,
    order: Order,
    target: Path | None,
    cache: str | Path | None,
    progress: Progress,
    world: World,
    companions: Path | None = None,
) -> Report:
    if isinstance(order.recipe, Structured):
        return compress_resident(model, tokenizer, name, order, target, progress, companions)
    given = (model, tokenizer, name, order, target, cache, progress, world, companions)
    if order.recipe.train is None or target is None or companions is None:
        return _factorized(*given)
    states = target.with_name(target.name + ".training")
    claim(states, {**order.identity(), "batch": order.batch, "model": files_key(companions)})
    with working(states, target):
        return _factorized(*given, states=states)


def _factorized(
    model: PreTrainedModel,
    tokenizer: Any,
    name: str,
    order: Order,
    target: Path | None,
    cache: str | Path | None,
    progress: Progress,
    world: World,
    companions: Path | None,
    states: Path | None = None,
) -> Report:
    """Compress a model in memory, in place; one that is trained first goes on from the directory `states`."""
    source, sink = ResidentModel(model, example=order.example), MemorySink()
    order = order.aligned(source.dtype, world)
    key = model_key(model) if cache or world.size > 1 else ""
    world.same("models", key)
    with tempfile.TemporaryDirectory() as own, PeakMemory() as memory:
        scratch = world.from_first(lambda: Path(own))
        job = order.job(source, tokenizer, sink, source.dtype, report=progress, scratch=scratch, world=world)
        job.cache = cache_of(cache, key, job.data) if cache else None
        if job.recipe.train is not None:
            job.cache = None  # what is known of the dense weights
            ranks = job.recipe.train(job, states)
            if job.recipe.rule is not None:
                job.recipe = dataclasses.replace(job.recipe, rule=lambda choice: dict(ranks))
        result = run(job)
        world.wait()  # before the directory that all use is gone
    report = _report(name, order, result, job, memory.peak_bytes)
    checkpoint.attach(
        model,
        {n: m.spec() for n, m in sink.modules.items()},
        shape=stored_shape(job, result.plan),
        **provenance(order, report, result.plan.to_dict()),
    )

    def save(directory: Path) -> Report:
        documents = {} if companions is None else {f.name: f.read_text() for f in small_files(companions)}
        checkpoint.save(model, tokenizer, directory, documents=documents)
        _keep_map(job, directory)
        found = with_bytes(report, directory, source.outline, source.dtype)
        document(found, directory)
        return found

    return report if target is None else world.from_first(lambda: save(target))


def _keep_map(job: Job, directory: Path) -> None:
    """Write the score map of a run that has trained one, from which `corank.prune` makes smaller models."""
    found = map_of(job.scored, job.recipe, job.limit, job.dtype)
    if found is not None:
        found.save(directory)


def _report(name: str, order: Order, result: Result, job: Job, peak: int | None) -> Report:
    """The account of a run; with several processes their number, and the peak of the one that used the most memory."""
    world = job.world
    report = make_report(name, order, result, job, max((p for p in world.gather(peak) if p is not None), default=None))
    return report if world.size == 1 else dataclasses.replace(report, extra={**report.extra, "processes": world.size})


def _streamed(
    source: StreamedModel,
    name: str,
    order: Order,
    target: Path,
    cache: str | Path | None,
    progress: Progress,
    world: World,
) -> Report:
    folds_channels(order, source)  # tells what it needs before a tokenizer is missed
    tokenizer = load_tokenizer(source.path) if isinstance(order.text, Text) else None
    if isinstance(order.recipe, Structured):
        return compress_streamed(source, tokenizer, name, order, target, progress)
    order = order.aligned(source.stored_dtype, world)
    work = target.with_name(target.name + ".partial")
    written = DirectorySink(work, source, source.stored_dtype)
    sink = written if world.first else ElsewhereSink(source)
    folders = {"work": work, "scratch": work / "statistics"}
    job = order.job(source, tokenizer, sink, source.stored_dtype, report=progress, world=world, **folders)
    key = world.from_first(lambda: files_key(source.path))
    job.cache = cache_of(cache, key, job.data)
    identity = {**order.identity(), "batch": order.batch, "model": key, "dtype": torch_dtype_name(source.dtype)}
    world.from_first(lambda: claim(work, identity))
    final = work / "checkpoint"

    def assemble() -> list[str]:
        with job.stage("write"):
            shutil.rmtree(final, ignore_errors=True)
            files = written.assemble(final)
            copy_companions(source.path, final)
        return files

    def finish(report: Report, files: list[str]) -> Report:
        notes = written.notes()
        checkpoint.finish_directory(
            final,
            source.config,
            notes["modules"],
            files,
            fingerprint=notes["fingerprint"],
            shape=stored_shape(job, result.plan),
            **provenance(order, report, result.plan.to_dict()),
        )
        report = with_bytes(report, final, source.outline, source.stored_dtype)
        document(report, final)
        _keep_map(job, final)
        checkpoint.publish(final, target)
        return report

    with working(work, target, world):
        with PeakMemory() as memory:
            result = run(job)
            files = world.from_first(assemble)
        report = _report(name, order, result, job, memory.peak_bytes)
        return world.from_first(lambda: finish(report, files))
