"""compress(): the one call that does it all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from corank import checkpoint
from corank.budget import Budget
from corank.engine.directory import DirectorySink, MemorySink, copy_companions
from corank.engine.passes import Job, Result, run
from corank.engine.store import torch_dtype_name
from corank.errors import CorankError
from corank.evaluate import PeakMemory, Perplexity, perplexity
from corank.evaluate.perplexity import adds_bos
from corank.jsonfile import read_json, write_json
from corank.model import (
    Calibration,
    Outline,
    ResidentModel,
    StreamedModel,
    Text,
    calibration,
    read_text,
    resolve,
    select_sites,
)
from corank.model.streaming import NotStreamable
from corank.recipe import Recipe, get
from corank.report import Report

VERSION = "0.1.0"
Progress = Callable[[int, str, float | None], None]
"""Called with (layer, stage, relative error or None)."""


@dataclass(frozen=True)
class Order:
    """What was asked for, checked: everything that defines a run besides the model.

    Attributes:
        method: name of the method.
        settings: all its parameters and the common fields that were set.
        recipe: built from them.
        budget: None if the recipe has a rank rule of its own and no budget was given.
        text: calibration text, None if the recipe measures nothing.
        samples, length, seed, batch: of the calibration.
    """

    method: str
    settings: dict[str, Any]
    recipe: Recipe
    budget: Budget | None
    text: Text | None
    samples: int = 64
    length: int = 512
    seed: int = 0
    batch: int = 8

    @classmethod
    def take(
        cls,
        method: str,
        budget: Mapping[str, Any],
        scope: str | None,
        settings: Mapping[str, Any],
        data: str | Path | Text,
        **rest: Any,
    ) -> Order:
        """Check everything that can be checked without the model.

        Raises:
            CorankError: unknown names, values out of range, no budget where one is needed, unreadable text.
        """
        entry = get(method)
        recipe = entry.recipe(**settings)
        given = any(value is not None for value in budget.values())
        size = budget.get("params") is not None or budget.get("bytes") is not None
        scope = scope or ("model" if size else "sites")
        limit = Budget.parse(**budget, scope=scope) if given or recipe.rule is None else None
        needs_text = bool(recipe.statistics) or recipe.sequential
        text = (data if isinstance(data, Text) else read_text(data)) if needs_text else None
        return cls(method, {**entry.parameters, **settings}, recipe, limit, text, **rest)

    def identity(self) -> dict[str, Any]:
        """The order as JSON; two orders with the same identity give the same result on the same model."""
        return {
            "method": self.method,
            "parameters": {k: str(v) for k, v in self.settings.items()},
            "budget": self.budget.to_dict() if self.budget else {},
            "data": self.text.sha256 if self.text else None,
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
        }

    def job(self, source: ResidentModel, tokenizer: Any, sink: Any, dtype: torch.dtype, **rest: Any) -> Job:
        """The engine's job for a model.

        Raises:
            CorankError: unknown sites, a text too short, a budget below what is not compressed.
        """
        sites = select_sites(source.outline.sites, self.recipe.targets, self.recipe.ignore)
        data = None
        if self.text is not None:
            if tokenizer is None:
                raise CorankError("Give tokenizer=..., which calibration needs.")
            data = calibration(tokenizer, self.text, self.samples, self.length, self.seed, bos=adds_bos(tokenizer))
        limit = None
        if self.budget is not None:
            inside = sum(s.numel for s in sites)
            limit = self.budget.limit(inside, source.outline.parameters - inside, dtype.itemsize * 8)
        return Job(source, self.recipe, sites, limit, data, sink, dtype, seed=self.seed, batch=self.batch, **rest)


def compress(
    model: str | Path | PreTrainedModel,
    method: str = "svd-llm",
    *,
    keep: float | str | None = None,
    remove: float | str | None = None,
    params: int | str | None = None,
    bytes: int | str | None = None,
    scope: str | None = None,
    out: str | Path | None = None,
    data: str | Path | Text = "builtin",
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
        scope: what the budget is counted over, the selected "sites" or the whole "model"; None: the sites for a
            fraction, the model for a size.
        out: directory to write. For a model in memory it may be None.
        data: calibration text: a file, ``datasets:NAME``, "builtin", or a `Text`.
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

    Raises:
        CorankError: bad input; nothing has been written or overwritten. An interrupted run keeps ``<out>.partial`` and
            goes on from there when it is called again.
    """
    budget = {"keep": keep, "remove": remove, "params": params, "bytes": bytes}
    target = None if out is None else check_target(out)
    order = Order.take(method, budget, scope, settings, data, samples=samples, length=length, seed=seed, batch=batch)
    report = progress or (lambda layer, stage, error: None)
    if isinstance(model, PreTrainedModel):
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        return _in_memory(model, tokenizer, name, order, target, cache, report)
    if target is None:
        raise CorankError("Give out=DIRECTORY: a model that is read from disk is written to disk.")
    path = resolve(model)
    if json.loads((path / "config.json").read_text()).get("quantization_config"):
        raise CorankError(f"{path} is compressed or quantized already; start from the dense model.")
    try:
        source = StreamedModel(path, device, to_dtype(dtype))
    except NotStreamable:
        whole, words = checkpoint.load(path, dtype=to_dtype(dtype), device=device)
        return _in_memory(whole, words, str(model), order, target, cache, report)
    return _streamed(source, str(model), order, target, cache, report)


def load(
    model: str | Path, dtype: str | torch.dtype | None = None, device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer, dense or compressed.

    Args:
        model: a directory, hub id, ``.gguf`` file or alias such as ``smollm2-135m``.
        dtype: of the weights; None: as stored.
        device: where to put it.

    Returns:
        (model, tokenizer). A compressed model has been verified against its fingerprint.

    Raises:
        CorankError: no such model, damaged or truncated files, a format of a newer corank.
    """
    return checkpoint.load(resolve(model), dtype=to_dtype(dtype), device=device)


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
) -> Report:
    source, sink = ResidentModel(model), MemorySink()
    with tempfile.TemporaryDirectory() as scratch, PeakMemory() as memory:
        job = order.job(source, tokenizer, sink, source.dtype, report=progress, scratch=Path(scratch))
        job.cache = _cache(cache, _model_key(model), job.data) if cache else None
        result = run(job)
    report = make_report(name, order, result, job, memory.peak_bytes)
    checkpoint.attach(model, {n: m.spec() for n, m in sink.modules.items()}, **_provenance(order, result, report))
    if target is not None:
        checkpoint.save(model, tokenizer, target)
        report = _with_bytes(report, target, source.outline, source.dtype)
        report.save(target / "report.json")
    return report


def _streamed(
    source: StreamedModel, name: str, order: Order, target: Path, cache: str | Path | None, progress: Progress
) -> Report:
    work = target.with_name(target.name + ".partial")
    tokenizer = load_tokenizer(source.path) if order.text is not None else None
    sink = DirectorySink(work, source, source.stored_dtype)
    job = order.job(
        source, tokenizer, sink, source.stored_dtype, report=progress, work=work, scratch=work / "statistics"
    )
    key = _files_key(source.path)
    job.cache = _cache(cache, key, job.data)
    _claim(work, {**order.identity(), "model": key, "dtype": torch_dtype_name(source.dtype)})
    final = work / "checkpoint"
    try:
        with PeakMemory() as memory:
            result = run(job)
            with job.stage("write"):
                shutil.rmtree(final, ignore_errors=True)
                files = sink.assemble(final)
                copy_companions(source.path, final)
        report = make_report(name, order, result, job, memory.peak_bytes)
        notes = sink.notes()
        checkpoint.finish_directory(
            final,
            source.config,
            notes["modules"],
            files,
            fingerprint=notes["fingerprint"],
            **_provenance(order, result, report),
        )
        report = _with_bytes(report, final, source.outline, source.stored_dtype)
        report.save(final / "report.json")
        checkpoint.publish(final, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CorankError(
                f"The disk is full; {target} was not written. Free some space and run the same command again: it "
                f"continues from {work}."
            ) from None
        raise
    except CorankError:  # the model or the data are at fault: the same run could not be continued
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)
    return report


def _claim(work: Path, identity: Mapping[str, Any]) -> None:
    """Take a work directory, or go on in it if it belongs to the same run."""
    note = work / "run.json"
    if note.is_file():
        if read_json(note) != json.loads(json.dumps(identity)):
            raise CorankError(
                f"{work} is left from a different interrupted run; repeat that command to finish it, or delete it."
            )
        return
    if work.exists() and any(work.iterdir()):
        raise CorankError(f"{work} exists and is not an interrupted run; delete it or choose another output directory.")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorankError(f"Cannot create {work}: {error.strerror}.") from None
    write_json(note, identity)


def _files_key(path: Path) -> str:
    """Identity of a checkpoint directory: names, sizes and times of its files."""
    digest = hashlib.sha256(str(path.resolve()).encode())
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            stamp = file.stat()
            digest.update(f"{file.name}:{stamp.st_size}:{stamp.st_mtime_ns}".encode())
    return digest.hexdigest()


def _model_key(model: PreTrainedModel) -> str:
    """Identity of a model in memory: its configuration and a sum over its weights."""
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    return hashlib.sha256(f"{model.config.to_json_string()}:{total!r}".encode()).hexdigest()


def _cache(cache: str | Path | None, model_key: str, data: Calibration | None) -> Path | None:
    if cache is None or data is None:
        return None
    key = hashlib.sha256(json.dumps([model_key, data.source], sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache).expanduser() / key


def _provenance(order: Order, result: Result, report: Report) -> dict[str, Any]:
    return {
        "recipe": {"method": order.method, "parameters": report.parameters, "budget": report.budget},
        "plan": result.plan.to_dict(),
        "provenance": {"seed": order.seed, "data": report.data, "versions": report.versions, "model": report.model},
    }


def make_report(name: str, order: Order, result: Result, job: Job, peak: int | None) -> Report:
    """The report of a run, before sizes on disk are known."""
    import transformers

    rows, outline = result.rows, job.source.outline
    inside = sum(r["params_dense"] for r in rows)
    after = sum(r["params"] for r in rows)
    every_flop = 2 * (sum(s.numel for s in outline.sites) + outline.head)
    saved_flops = sum(2 * r["params_dense"] - r["flops"] for r in rows)
    rows_by_loss = [r for r in rows if r["kind"] != "dense"]
    warnings = []
    if not rows_by_loss:
        warnings.append("Every site stayed dense: the budget asks for nothing, or factors would not be smaller.")
    accounting = {
        "sites": {"dense": inside, "compressed": after},
        "model": {"dense": outline.parameters, "compressed": outline.parameters - inside + after},
        "flops_per_token": {"dense": every_flop, "compressed": every_flop - saved_flops},
        "break_even": _break_even(job.recipe, outline),
    }
    return Report(
        model=name,
        method=order.method,
        corank=VERSION,
        parameters={k: list(v) if isinstance(v, tuple) else v for k, v in order.settings.items()},
        budget=order.budget.to_dict() if order.budget else {},
        accounting=accounting,
        sites=rows,
        stages=dict(job.stages),
        peak_memory_bytes=peak,
        seed=order.seed,
        data=job.data.source if job.data else {},
        versions={
            "corank": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": torch_dtype_name(job.dtype),
        },
        warnings=warnings,
        extra={} if result.distances is None else {"angular_distances": result.distances},
    )


def _break_even(recipe: Recipe, outline: Outline) -> dict[str, int]:
    """For each role, the largest rank at which the stored kind is smaller than the dense matrix."""
    from corank.budget import count_break_even
    from corank.factors import KINDS

    shapes = {s.role: s.shape for s in outline.sites}
    return {role: count_break_even(shape, KINDS[recipe.kind][0].count) for role, shape in shapes.items()}


def _with_bytes(report: Report, directory: Path, outline: Outline, dtype: torch.dtype) -> Report:
    """Add the bytes on disk: of the safetensors files written, and of the dense model in the same dtype."""
    written = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    accounting = {**report.accounting, "bytes": {"dense": outline.parameters * dtype.itemsize, "compressed": written}}
    return dataclasses.replace(report, accounting=accounting)
