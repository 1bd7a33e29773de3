"""Handing a model over to other runtimes: a dense checkpoint, ONNX, OpenVINO, a torch.export program, GGUF.

An export is a new directory (a file for GGUF) that appears complete or not at all, and only after it has been
checked: the graphs by running them in ONNX Runtime and OpenVINO, the torch program by loading it back and running it,
each on batches and lengths other than the one it was traced with, padded sequences among them. In all of them the
factors stay factors; that is also checked in the graphs that ONNX Runtime and OpenVINO make when they fold constants.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from corank import checkpoint
from corank.errors import CorankError, unknown
from corank.evaluate.perplexity import context_length
from corank.factors import ExpertList
from corank.jsonfile import write_json
from corank.model import resolve

FORMATS = ("dense", "onnx", "openvino", "torch", "gguf")
INPUTS = ("input_ids", "attention_mask")
#: (batch, length) of the trace, and of the checks
TRACED = (2, 8)
CHECKED = ((1, 1), (1, 7), (3, 12), (2, 33))

Step = Callable[[str, int, int], None]
"""Called with (what, done, of)."""


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written and how it was checked.

    Attributes:
        format: one of `FORMATS`.
        path: the directory or file.
        files: name -> bytes.
        parameters: of the model, tied ones once.
        difference: largest absolute difference of a logit from the model's own over all checks; None for formats
            that have no logits to check (dense, gguf).
        magnitude: largest absolute logit in the checks.
        initializers: for ONNX and OpenVINO, numbers stored in the graph as exported.
        optimized: the same in the graph that ONNX Runtime or OpenVINO makes of it and runs.
        copied: how many of those are a second copy of tied matrices.
        densified: parameters that the model would have if the factors had been multiplied out.
    """

    format: str
    path: Path
    files: dict[str, int]
    parameters: int
    difference: float | None = None
    magnitude: float | None = None
    initializers: int | None = None
    optimized: int | None = None
    copied: int | None = None
    densified: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


def silent(what: str, done: int, of: int) -> None:
    """Report nothing."""


def export(model: str | Path, format: str, out: str | Path, *, tolerance: float = 1e-4, step: Step = silent) -> Export:
    """Export a model.

    Args:
        model: a directory, hub id or alias; compressed or dense.
        format: "dense" (a plain Hugging Face checkpoint), "onnx" and "openvino" (float32), "torch" (a torch.export
            program in the stored dtype) or "gguf" (dense, by llama.cpp's converter).
        out: directory to write, absent or empty; for gguf a file name ending in ``.gguf``.
        tolerance: largest difference of a logit, as a fraction of the largest logit where that exceeds 1. For 16-bit
            torch programs at least four units in the last place.
        step: progress.

    Returns:
        What was written. ``export.json`` in the directory says the same.

    Raises:
        CorankError: unknown format, missing optional packages, a target that exists, an architecture that takes
            something else than tokens, or a check that failed; nothing is left behind.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    path = resolve(model)
    if format == "gguf":
        from corank.serve.gguf import to_gguf

        return to_gguf(path, Path(out), step)
    target = checkpoint.check_target(Path(out).expanduser())
    if format == "dense":
        return _dense(path, target, step)
    write, dtype = _writer(format)
    step(f"export to {format}", 0, 4)
    loaded, tokenizer = checkpoint.load(path, dtype=dtype)
    with _directory(target) as partial:
        found = write(loaded, partial, tolerance, step)
        stock_config(loaded).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        done = Export(format, target, sizes(partial), count(loaded), **found)
        write_json(partial / "export.json", done.to_json())
    return done


def _writer(format: str) -> tuple[Callable[[Any, Path, float, Step], dict[str, Any]], torch.dtype | None]:
    """What writes and checks a graph, and the dtype it wants the model in; its packages are there."""
    if format == "onnx":
        from corank.serve.onnx import require_onnx, write_onnx

        require_onnx()
        return write_onnx, torch.float32
    if format == "openvino":
        from corank.serve.openvino import require_openvino, write_openvino

        require_openvino()
        return write_openvino, torch.float32
    return _write_program, None


def _dense(path: Path, target: Path, step: Step) -> Export:
    step("export to dense", 0, 2)
    loaded, tokenizer = checkpoint.load(path)
    if getattr(loaded.config, "quantization_config", None) is None:
        raise CorankError(f"{path} is dense already.")
    dense = checkpoint.dequantize(loaded)
    step("export to dense", 1, 2)
    checkpoint.save(dense, tokenizer, target)
    step("export to dense", 2, 2)
    return Export("dense", target, sizes(target), count(dense))


def _write_program(model: Any, folder: Path, tolerance: float, step: Step) -> dict[str, Any]:
    own_storages(model)
    exported = program(model)
    step("export to torch", 2, 4)
    torch.export.save(exported, folder / "model.pt2")
    step("export to torch", 3, 4)
    again = torch.export.load(folder / "model.pt2").module()
    worst = compare(model, lambda ids, mask: again(ids, mask), tolerance, "the reloaded torch.export program")
    step("export to torch", 4, 4)
    return worst


def own_storages(model: nn.Module) -> None:
    """Give every empty tensor, and every one that is part of a larger storage, a storage of its own.

    torch.export.save tells storages by their address, and an empty tensor (a factor of rank 0) that was mapped from
    a file has that of the tensor after it.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size() or not tensor.numel():
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)


class Logits(nn.Module):
    """(input_ids, attention_mask), both [B, T] int64 -> logits [B, T, V], without a cache.

    Raises:
        CorankError: the model takes something else than a sequence of tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        if getattr(model, "main_input_name", "") != "input_ids" or config.is_encoder_decoder:
            raise CorankError(
                f"{type(model).__name__} does not map a sequence of tokens to logits; only such models can be exported."
            )
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits


def program(model: Any) -> torch.export.ExportedProgram:
    """The forward pass as a torch.export program with free batch and sequence axes (the latter up to the context).

    Raises:
        CorankError: torch.export cannot trace it.
    """
    if any(isinstance(module, ExpertList) for module in model.modules()):
        raise CorankError(
            "The factorized experts of this model each run on the tokens that are routed to them, which one fixed graph "
            "cannot hold; --format dense multiplies them out."
        )
    wrapped = Logits(model).eval()
    context = context_length(model)
    batch = torch.export.Dim("batch", min=1)
    sequence = torch.export.Dim("sequence", min=1, max=context) if context else torch.export.Dim("sequence", min=1)
    axes = {0: batch, 1: sequence}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                wrapped, sample_inputs(model, *TRACED, padded=False), dynamic_shapes=(axes, axes), strict=False
            )
    except Exception as error:  # the exporter has errors of many classes, all about the architecture
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CorankError(f"torch.export cannot trace {type(model).__name__}: {reason}") from error


def sample_inputs(model: Any, batch: int, length: int, *, padded: bool) -> tuple[Tensor, Tensor]:
    """Random (input_ids, attention_mask), [batch, length]; if `padded`, the last sequence is half padding."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, (length + 1) // 2 :] = 0
    return ids, mask


@torch.no_grad()
def compare(model: Any, run: Callable[[Tensor, Tensor], Tensor], tolerance: float, what: str) -> dict[str, float]:
    """Compare another form of a model with the model itself on several batches and lengths.

    Args:
        model: the original.
        run: (input_ids, attention_mask) -> logits of the other form.
        tolerance: see :func:`export`.
        what: the other form, for the error.

    Returns:
        {"difference", "magnitude"}, the largest absolute difference and logit where there is no padding.

    Raises:
        CorankError: they differ by more than the tolerance, or the other form cannot run.
    """
    wrapped = Logits(model).eval()
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    allowed = max(tolerance, 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0)
    context = context_length(model) or max(length for _, length in CHECKED)
    difference = magnitude = 0.0
    for batch, length in CHECKED:
        length = min(length, context)
        ids, mask = sample_inputs(model, batch, length, padded=batch > 1)
        expected = wrapped(ids, mask).double()
        try:
            actual = run(ids, mask).double()
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CorankError(f"{what} fails at batch {batch}, length {length}: {reason}") from error
        if actual.shape != expected.shape:
            raise CorankError(f"{what} gives logits {list(actual.shape)} where the model gives {list(expected.shape)}.")
        real = mask.bool()
        off, size = float((actual - expected)[real].abs().max()), float(expected[real].abs().max())
        if not off <= allowed * max(1.0, size):  # written so that NaN fails
            raise CorankError(
                f"{what} is off by {off:.3g} at batch {batch}, length {length}, where logits reach {size:.3g} and "
                f"{allowed:.1g} of that is allowed; nothing has been written."
            )
        difference, magnitude = max(difference, off), max(magnitude, size)
    return {"difference": difference, "magnitude": magnitude}


def stock_config(model: Any) -> Any:
    """The model's configuration without corank's part, whose checkpoint does not lie beside it."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def sizes(folder: Path) -> dict[str, int]:
    """File name -> bytes."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn about their own internals and about packages that are not needed here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _directory(target: Path) -> Iterator[Path]:
    """A directory beside the target that becomes it when the block ends well, and vanishes when it does not."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
        except OSError as error:
            raise CorankError(f"Could not write {target}: {error.strerror or error}.") from error
        checkpoint.publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
