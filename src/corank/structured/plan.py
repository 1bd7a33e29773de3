"""From a budget to what becomes of every block, and the pass that makes it so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.factors import put_together
from corank.model import StreamedModel
from corank.structured import narrow
from corank.structured.attention import missing
from corank.structured.block import Block, Narrowed
from corank.structured.depth import Depth, walk
from corank.structured.recipe import Selection
from corank.structured.shape import BlockShape, shape_of_block
from corank.structured.task import Task
from corank.structured.units import find_units, sentences
from corank.structured.widths import Blocks, needs_scores, widths

FEW = 8
"""Windows that are enough to see what each block changes."""


@dataclass(frozen=True)
class Plan:
    """What is to become of every block.

    Attributes:
        selection: which of them go.
        kept: those that stay, in order.
        widths: what each of these is to get, empty if none is narrowed.
        skipped: sentences on what the recipe would narrow but cannot.
    """

    selection: Selection
    kept: tuple[int, ...]
    widths: tuple[BlockShape, ...] = ()
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "removed": list(self.selection.removed),
            "mixes": {str(i): {str(j): share for j, share in mix.items()} for i, mix in self.selection.mixes.items()},
            "kept": list(self.kept),
            "widths": [w.to_dict() for w in self.widths],
            "skipped": list(self.skipped),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        mixes = {int(i): {int(j): float(share) for j, share in mix.items()} for i, mix in data["mixes"].items()}
        return cls(
            Selection(tuple(data["removed"]), mixes),
            tuple(data["kept"]),
            tuple(BlockShape.from_dict(w) for w in data["widths"]),
            tuple(data.get("skipped", ())),
        )


def make_plan(task: Task) -> Plan:
    """Choose the blocks that go and the widths of those that stay.

    Raises:
        CorankError: the budget cannot be met.
    """
    selection = Selection(())
    if task.recipe.depth is not None:
        with task.stage("choose blocks"):
            case = Depth(task)
            selection = task.recipe.depth(case)
            if not task.recipe.units and not case.enough(selection.removed):
                raise CorankError(
                    f"The budget ({task.budget.describe()}) asks for more blocks than this method can take away around the "
                    "protected ones; protect fewer, or keep more."
                )
    kept = selection.kept(task.layers)
    return Plan(selection, kept, *(_widths(task, kept) if task.recipe.units else ()))


def narrows(task: Task, plan: Plan) -> bool:
    """Whether a plan gives any block other widths than it has."""
    shapes = [shape_of_block(task.source.config, task.sites(layer)) for layer in plan.kept]
    return any(width != shape for width, shape in zip(plan.widths, shapes, strict=False))


def blocks_of(task: Task, kept: tuple[int, ...]) -> tuple[Blocks, tuple[str, ...], int]:
    """The blocks that stay, what is said of units that cannot be taken out of them, and what their matrices may count."""
    source, recipe = task.source, task.recipe
    sites = [task.sites(layer) for layer in kept]
    shapes = [shape_of_block(source.config, each) for each in sites]
    found = [
        find_units(source.model.get_submodule(path), each, f"{path}.", source.config)
        for path, each in zip(map(source.outline.path, kept), sites, strict=True)
    ]
    skipped = sentences([each for _, several in found for each in several], recipe.units)
    skipped += [] if recipe.split is None else missing(sites)
    protected = recipe.protected(task.layers)
    blocks = Blocks(
        shapes, sites, [units for units, _ in found], [i for i, layer in enumerate(kept) if layer in protected]
    )
    limit = task.limit - sum(task.around[layer] for layer in kept)
    if task.whole and recipe.compensate in ("bias", "affine-ls") and limit < blocks.dense:
        # an ordinary configuration that has some biases has them all, those that nobody needs as zeros
        limit -= sum(site.shape[0] for each in sites for site in each if not site.bias)
    return blocks, tuple(skipped), limit


def _widths(task: Task, kept: tuple[int, ...]) -> tuple[tuple[BlockShape, ...], tuple[str, ...]]:
    """The widths of the blocks that stay, and what is said of units that cannot be taken out of them."""
    recipe = task.recipe
    blocks, skipped, limit = blocks_of(task, kept)
    influence = scores = None
    with task.stage("choose widths"):
        if recipe.allocate == "entropic":
            changes = walk(_few(task)).changes
            influence = [changes[layer] for layer in kept]
        if needs_scores(recipe, blocks, limit):
            scores = _scores(task, kept, list(blocks.shapes))
        return tuple(widths(recipe, blocks, limit, influence=influence, scores=scores)), skipped


def _few(task: Task) -> Task:
    """The same with a quarter of the windows, if they are many: a mean of cosines over tokens needs no more."""
    if task.data is None or task.data.examples or len(task.data.ids) < 4 * FEW:
        return task
    count = max(len(task.data.ids) // 4, FEW)
    mask = None if task.data.mask is None else task.data.mask[:count]
    return dataclasses.replace(task, data=dataclasses.replace(task.data, ids=task.data.ids[:count], mask=mask))


def _scores(task: Task, kept: tuple[int, ...], shapes: list[BlockShape]) -> list[Mapping[str, Tensor]]:
    found: list[Mapping[str, Tensor]] = []
    for block in _visits(task, kept, shapes, "score"):
        found.append(narrow.scores(block))
        _advance(block)
    return found


def _visits(task: Task, kept: tuple[int, ...], shapes: list[BlockShape], stage: str) -> Iterator[Block]:
    """Each block that stays, with its weights, and with the activations that enter it.

    Whoever iterates advances the stream before the next one.
    """
    source, recipe = task.source, task.recipe
    sensitivity = task.sensitivity  # measured before any block is changed
    stream = Stream(source, task.data, task.batch) if task.data is not None else None
    dense = stream.copy() if stream is not None and recipe.anchored else None
    for layer, shape in zip(kept, shapes, strict=True):
        task.report(layer, stage, None)
        with torch.no_grad(), source.block(layer) as module:
            prefix = f"{source.outline.path(layer)}."
            sites = task.sites(layer)
            yield Block(
                layer, module, sites, prefix, shape, source.config, stream, recipe, task.seed, dense, sensitivity
            )


def _advance(block: Block) -> None:
    """Let the stream go on behind a block: with what it made when it was observed, else with what it now makes."""
    if block.stream is not None:
        block.stream.hidden = block.outputs() if block.recipe.sequential else block.passed or block.outputs()


def narrow_all(
    task: Task,
    plan: Plan,
    put: Callable[[Block, Narrowed], None],
    done: Callable[[Block, BlockShape], Narrowed | None] = lambda block, target: None,
) -> dict[int, Narrowed]:
    """Narrow every block that stays.

    Args:
        task: what to do.
        plan: the widths.
        put: takes a finished block.
        done: what became of a block that is finished already (it is then left as it is, dense), else None.

    Returns:
        what became of each, by its number in the source.
    """
    if not plan.widths:
        return {}
    found: dict[int, Narrowed] = {}
    shapes = [shape_of_block(task.source.config, task.sites(layer)) for layer in plan.kept]
    with task.stage("narrow"):
        targets = dict(zip(plan.kept, plan.widths, strict=True))
        for block in _visits(task, plan.kept, shapes, "narrow"):
            target = targets[block.layer]
            before = done(block, target)
            beside = (
                None
                if block.dense is None
                else [block.dense.run(block.module, block.layer, i) for i in range(len(block.dense))]
            )
            if before is None and target == block.shape:
                before = Narrowed(target)
            if before is None:
                made = narrow.narrow(block, target)
                if made.shape != target:
                    raise AssertionError(f"block {block.layer}: asked for {target}, got {made.shape}")
                _check_finite(block)
                put_together(block.module)
                put(block, made)
            found[block.layer] = before or made
            _advance(block)
            if block.dense is not None and beside is not None:
                block.dense.hidden = beside
            if before is None and isinstance(task.source, StreamedModel):
                block.module.to("meta")  # what took the place of what was read is nobody else's to free
    return found


def _check_finite(block: Block) -> None:
    for name, parameter in block.module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CorankError(
                f"{block.prefix}{name} is not finite after narrowing; raise ridge, or calibrate on more tokens."
            )
