"""From a structured recipe to a smaller model: choose blocks, choose widths, narrow, renumber, describe, write.

The blocks are visited at most three times, one at a time in memory: to choose which of them go, to measure what their widths
depend on, and to narrow those that stay. A model on disk is written block by block; one in memory is changed in place.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from corank import checkpoint
from corank.account import document, provenance, with_bytes
from corank.checkpoint.skeleton import collect
from corank.engine.claim import claim, files_key, working
from corank.engine.directory import copy_companions, small_files, write_shards
from corank.engine.store import torch_dtype_name
from corank.errors import CorankError
from corank.evaluate import PeakMemory
from corank.jsonfile import read_json, write_json
from corank.model import ResidentModel, StreamedModel, Text
from corank.model.outline import model_class
from corank.order import Order
from corank.report import Report
from corank.structured import native
from corank.structured.block import Block, Narrowed
from corank.structured.convolutions import NEEDS_IMAGES, fold_convolutions
from corank.structured.directory import BlockFiles, of_matrices
from corank.structured.native import Native
from corank.structured.outcome import Outcome, report_of
from corank.structured.plan import Plan, make_plan, narrow_all, narrows
from corank.structured.recipe import Selection, Structured
from corank.structured.residual import slice_residual
from corank.structured.rotation import head_size, keep_pairs
from corank.structured.rotations import slice_each
from corank.structured.shape import BlockShape, Shape, shape_of_block
from corank.structured.task import Task, folds_convolutions

Progress = Callable[[int, str, float | None], None]


def compress_resident(
    model: PreTrainedModel,
    tokenizer: Any,
    name: str,
    order: Order,
    target: Path | None,
    progress: Progress,
    companions: Path | None = None,
    work: Path | None = None,
    dtype: torch.dtype | None = None,
) -> Report:
    """Compress a model in memory, in place, and write it to `target` if there is one.

    Args:
        model: its list of blocks is replaced; its configuration is changed along with it.
        tokenizer: for calibration, and to be saved.
        name: for the report.
        order: what was asked for.
        target: directory, absent or empty, or None.
        progress: called with (layer, stage, None).
        companions: directory whose small files are copied beside the weights.
        work: directory of its own, in which a recipe that trains keeps its state and the result until it is complete.
        dtype: of the result; None: that of the model.

    Raises:
        CorankError: bad input.
    """
    source = ResidentModel(model, example=order.example)
    folds = folds_channels(order, source)
    task = order.task(source, tokenizer, dtype or source.dtype, report=progress)
    if folds:
        return _compress_channels(task, tokenizer, name, order, target, companions)
    if "residual" in task.recipe.units:
        return _compress_residual(task, tokenizer, name, order, target, companions)
    parameters = source.outline.parameters
    with PeakMemory() as memory:
        plan = make_plan(task)
        before = [_size(source.model.get_submodule(source.outline.path(i))) for i in range(task.layers)]
        sliced = unit_map = None
        if task.recipe.learn is not None and (narrows(task, plan) or getattr(task.recipe.learn, "always", False)):
            learned = task.recipe.learn(task, plan, work)
            plan, narrowed, sliced, unit_map = learned.plan, learned.narrowed, learned.sliced, learned.map
            trained: Any = model
            trained.to(dtype=task.dtype)
        else:
            narrowed = narrow_all(task, plan, lambda block, made: None)
        _merge(source, plan)
        blocks = [source.model.get_submodule(source.outline.path(i)) for i in plan.kept]
        source.model.set_submodule(source.outline.blocks, nn.ModuleList(blocks))
        _renumber(blocks)
        if plan.widths and plan.widths[0].pairs:
            keep_pairs(model, head_size(model.config), plan.widths[0].pairs)
    modules = collect(model)
    shape = Shape(plan.kept, plan.widths)
    sizes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if not model.config.architectures:  # a model that has never been saved
        model.config.architectures = [type(model).__name__]
    described = native.describe(model.config, shape, sizes, factors=bool(modules))
    native.add_zeros(model, described.zeros)
    parameters = _size(model) if sliced is not None else parameters + sum(map(_size, blocks)) - sum(before)
    outcome = Outcome(plan, narrowed, described, parameters, sliced)
    report = report_of(name, order, task, outcome, memory.peak_bytes)
    ordinary = described.kind in ("N0", "N1")
    own = type(described.config) is type(model.config)
    _adopt(model, described.config if own else native.base(model.config, shape))
    if not ordinary or not own:  # only through the door can the class that it has be loaded again
        stays = described if not ordinary else dataclasses.replace(described, kind="N2")
        checkpoint.attach(model, modules, shape=native.door(stays, shape), **provenance(order, report, plan.to_dict()))
    if target is None:
        return report
    exported = _as_described(model, described) if ordinary else model
    documents = {} if companions is None else {f.name: f.read_text() for f in small_files(companions)}
    final = target if work is None else work / "checkpoint"
    if work is not None:
        shutil.rmtree(final, ignore_errors=True)  # of a run that was interrupted here
    checkpoint.save(exported, tokenizer, final, documents=documents)
    report = with_bytes(report, final, source.outline, task.dtype)
    document(report, final)
    if unit_map is not None:
        unit_map.save(final)
    if work is not None:
        checkpoint.publish(final, target)
    return report


def _learn_from_disk(
    source: StreamedModel, tokenizer: Any, name: str, order: Order, target: Path, progress: Progress
) -> Report:
    """Compress a model that has to be in memory as a whole, because it is trained; it goes on where it was interrupted."""
    work = target.with_name(target.name + ".partial")
    identity = {**order.identity(), "batch": order.batch, "model": files_key(source.path)}
    claim(work, {**identity, "dtype": torch_dtype_name(source.dtype)})
    with working(work, target):
        wide = torch.promote_types(source.dtype, torch.float32)
        whole, _ = checkpoint.load(source.path, dtype=wide, device=str(source.device), tokenizer=False)
        dtype = source.stored_dtype
        return compress_resident(whole, tokenizer, name, order, target, progress, source.path, work, dtype)


def _compress_residual(
    task: Task, tokenizer: Any, name: str, order: Order, target: Path | None, companions: Path | None
) -> Report:
    """Cut the residual stream of a model in memory, in place, and write it."""
    model = task.source.model
    before = [shape_of_block(model.config, task.sites(layer)) for layer in range(task.layers)]
    with PeakMemory() as memory:
        sliced = slice_each(task) if task.recipe.rotations == "each" else slice_residual(task)
        model.to(dtype=task.dtype)
    kept = tuple(range(task.layers))
    sizes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if sliced.widths:
        described = Native(model.config, "N4", why="its residual stream passes through maps between bases")
    else:
        described = native.describe(model.config, Shape(kept), sizes)
    plan = Plan(Selection(()), kept)
    outcome = Outcome(plan, {}, described, _size(model), sliced)
    report = report_of(name, order, task, outcome, memory.peak_bytes)
    if sliced.widths:
        shape = {"blocks": [b.to_dict() for b in before], "residual": list(sliced.widths)}
        checkpoint.attach(model, {}, shape=shape, **provenance(order, report, plan.to_dict()))
    if target is None:
        return report
    exported = model if sliced.widths else _as_described(model, described)
    documents = {} if companions is None else {f.name: f.read_text() for f in small_files(companions)}
    checkpoint.save(exported, tokenizer, target, documents=documents)
    report = with_bytes(report, target, task.source.outline, task.dtype)
    document(report, target)
    return report


def folds_channels(order: Order, source: ResidentModel) -> bool:
    """Whether channels of convolutions are to be folded.

    Raises:
        CorankError: batch norms are to be measured, on a text or where there are none.
    """
    folds = isinstance(order.recipe, Structured) and folds_convolutions(order.recipe, source.outline)
    if folds and isinstance(order.text, Text):
        raise CorankError(NEEDS_IMAGES)
    if isinstance(order.recipe, Structured) and order.recipe.repair == "data" and not folds:
        raise CorankError(
            "repair=data measures the batch norms of convolutional networks, which this model is not; leave it out."
        )
    return folds


def _compress_channels(
    task: Task, tokenizer: Any, name: str, order: Order, target: Path | None, companions: Path | None
) -> Report:
    """Fold the channels of a convolutional network in memory, in place, and write it."""
    model: Any = task.source.model
    if not model.config.architectures:  # a model that has never been saved
        model.config.architectures = [type(model).__name__]
    with PeakMemory() as memory:
        folded = fold_convolutions(task)
        model.to(dtype=task.dtype)
    kept = tuple(range(task.layers))
    sizes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    pairs = {(before, after) for _, before, after in folded.groups}
    same = dict(pairs) if len(dict(pairs)) == len(pairs) else {}
    described = native.describe_channels(model.config, same, sizes) if pairs else Native(model.config, "N0")
    plan = Plan(Selection(()), kept)
    report = report_of(name, order, task, Outcome(plan, {}, described, _size(model), None, folded), memory.peak_bytes)
    if described.kind == "N0":
        _adopt(model, described.config)
    else:
        shape = {"blocks": [], "tensors": {key: list(size) for key, size in folded.tensors.items()}}
        checkpoint.attach(model, {}, shape=shape, **provenance(order, report, plan.to_dict()))
    if target is None:
        return report
    exported = _as_described(model, described) if described.kind == "N0" else model
    documents = {} if companions is None else {f.name: f.read_text() for f in small_files(companions)}
    checkpoint.save(exported, tokenizer, target, documents=documents)
    report = with_bytes(report, target, task.source.outline, task.dtype)
    document(report, target)
    return report


def _adopt(model: PreTrainedModel, config: Any) -> None:
    """Give the configuration that a model and its parts share the content of another."""
    for mine, other in ((model.config, config), (model.config.get_text_config(), config.get_text_config())):
        known = vars(mine)
        for key, value in vars(other).items():
            part = key.startswith("_") or hasattr(value, "to_dict")  # a configuration inside this one has its own turn
            if not part and (key == "head_dim" or key in known) and known.get(key) != value:
                setattr(mine, key, value)


def _as_described(model: PreTrainedModel, described: Native) -> PreTrainedModel:
    """The same tensors in a model of the class that the new configuration names; nothing is copied."""
    config = described.config
    with torch.device("meta"):
        made = model_class(config)(config)
    made.load_state_dict(model.state_dict(), strict=True, assign=True)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = model.generation_config
    return made


def _merge(source: ResidentModel, plan: Plan) -> None:
    """Replace matrices of blocks by means over the blocks that are merged into them."""
    outline = source.outline
    for into, mix in plan.selection.mixes.items():
        blocks = {i: source.model.get_submodule(outline.path(i)) for i in mix}
        for name in of_matrices(blocks[into]):
            mixed = sum(share * blocks[i].get_parameter(name).detach().double() for i, share in mix.items())
            with torch.no_grad():
                blocks[into].get_parameter(name).copy_(mixed)  # type: ignore[arg-type]


def _renumber(blocks: list[nn.Module]) -> None:
    """Tell every part of a block its new number, under which it finds its place in the cache."""
    for number, block in enumerate(blocks):
        for part in block.modules():
            for attribute in ("layer_idx", "layer_id"):
                if isinstance(part.__dict__.get(attribute), int):
                    setattr(part, attribute, number)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def compress_streamed(
    source: StreamedModel, tokenizer: Any, name: str, order: Order, target: Path, progress: Progress
) -> Report:
    """Compress a model from disk to disk, one block at a time in memory.

    Args:
        source: the model.
        tokenizer: for calibration.
        name: for the report.
        order: what was asked for.
        target: directory to write, absent or empty.
        progress: called with (layer, stage, None).

    Raises:
        CorankError: bad input; nothing has been written. An interrupted run goes on from ``<target>.partial``.
    """
    if (
        isinstance(order.recipe, Structured) and "residual" in order.recipe.units
    ):  # it changes what lies around the blocks
        whole, _ = checkpoint.load(source.path, dtype=source.dtype, device=str(source.device), tokenizer=False)
        resident = ResidentModel(whole, example=order.example)
        task = order.task(resident, tokenizer, source.stored_dtype, report=progress)
        return _compress_residual(task, tokenizer, name, order, target, source.path)
    if folds_channels(order, source):
        whole, _ = checkpoint.load(source.path, dtype=source.dtype, device=str(source.device), tokenizer=False)
        task = order.task(ResidentModel(whole, example=order.example), tokenizer, source.stored_dtype, report=progress)
        return _compress_channels(task, tokenizer, name, order, target, source.path)
    if isinstance(order.recipe, Structured) and order.recipe.learn is not None:
        return _learn_from_disk(source, tokenizer, name, order, target, progress)
    work = target.with_name(target.name + ".partial")
    task = order.task(source, tokenizer, source.stored_dtype, report=progress)
    key = files_key(source.path)
    identity = {**order.identity(), "batch": order.batch, "model": key, "dtype": torch_dtype_name(source.dtype)}
    claim(work, identity)
    files = BlockFiles(work, source, source.stored_dtype)
    final = work / "checkpoint"
    with working(work, target):
        with PeakMemory() as memory:
            plan = _planned(work, task)
            dense = [_size(source.model.get_submodule(source.outline.path(i))) for i in range(task.layers)]
            sizes = {key: tuple(tensor.shape) for key, tensor in source.model.state_dict().items()}
            narrowed, notes = _narrow_to_files(task, plan, files)
            outcome, modules = _described(task, plan, narrowed, notes, sizes, dense)
            with task.stage("write"):
                shutil.rmtree(final, ignore_errors=True)
                tensors = files.tensors(plan.kept, plan.selection.mixes, outcome.described.zeros)
                written = write_shards(tensors, final)
                copy_companions(source.path, final)
        report = report_of(name, order, task, outcome, memory.peak_bytes)
        config = outcome.described.config
        if outcome.described.kind in ("N0", "N1"):
            config.architectures = [model_class(config).__name__]
            config.dtype = source.stored_dtype
            config.save_pretrained(final)
        else:
            shape = native.door(outcome.described, Shape(plan.kept, plan.widths))
            said = provenance(order, report, plan.to_dict())
            checkpoint.finish_directory(final, config, modules, written, shape=shape, **said)
        report = with_bytes(report, final, source.outline, source.stored_dtype)
        document(report, final)
        checkpoint.publish(final, target)
        return report


def _planned(work: Path, task: Task) -> Plan:
    """The plan of an interrupted run, or a new one."""
    file = work / "plan.json"
    if not file.is_file():
        write_json(file, make_plan(task).to_dict())
    return Plan.from_dict(read_json(file))


def _narrow_to_files(
    task: Task, plan: Plan, files: BlockFiles
) -> tuple[dict[int, Narrowed], dict[int, dict[str, Any]]]:
    """Narrow the blocks that an interrupted run has not finished, and write them."""

    def put(block: Block, made: Narrowed) -> None:
        tensors = {name: list(tensor.shape) for name, tensor in block.module.state_dict().items()}
        note = {
            "losses": dict(made.losses),
            "tensors": tensors,
            "parameters": _size(block.module),
            "modules": collect(block.module),
        }
        files.put(block.layer, block.module, note)

    def done(block: Block, target: BlockShape) -> Narrowed | None:
        note = files.note(block.layer)
        if note is None or (task.recipe.sequential and block.stream is not None):
            return None  # what follows needs what this block has become
        return Narrowed(target, note["losses"])

    narrowed = narrow_all(task, plan, put, done)
    notes = {layer: note for layer in plan.kept if (note := files.note(layer)) is not None}
    return narrowed, notes


def _described(
    task: Task,
    plan: Plan,
    narrowed: Mapping[int, Narrowed],
    notes: Mapping[int, Mapping[str, Any]],
    sizes: native.Sizes,
    dense: list[int],
) -> tuple[Outcome, dict[str, dict[str, Any]]]:
    """The result as its tensors describe it, and the specs of its factorized modules.

    Args:
        sizes: tensors of the source.
        dense: parameters of its blocks.
    """
    outline = task.source.outline
    after = {name: size for name, size in sizes.items() if not outline.inside(name)}
    parameters = outline.parameters - sum(dense)
    modules: dict[str, dict[str, Any]] = {}
    for new, old in enumerate(plan.kept):
        path = f"{outline.path(new)}."
        if old in notes:
            after |= {path + name: tuple(shape) for name, shape in notes[old]["tensors"].items()}
            modules |= {path + name: spec for name, spec in notes[old]["modules"].items()}
            parameters += notes[old]["parameters"]
        else:
            before = f"{outline.path(old)}."
            after |= {path + n.removeprefix(before): s for n, s in sizes.items() if n.startswith(before)}
            parameters += dense[old]
    shape = Shape(plan.kept, plan.widths)
    described = native.describe(task.source.config, shape, after, factors=bool(modules))
    parameters += sum(torch.Size(size).numel() for size in described.zeros.values())
    return Outcome(plan, narrowed, described, parameters), modules
