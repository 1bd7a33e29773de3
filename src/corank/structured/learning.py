"""Learning which units go: gates on a model in memory, adapters beside them, and the smaller model that comes of it.

A method that trains gives `Structured.learn`, a function of a `Case`: it trains gates with the one engine of `corank.gates`,
says in `Masks` what stays, and hands both to `take_out`. Gates of survivors need not be 1: they go into the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from corank.errors import CorankError
from corank.factors import is_conv1d, weight_of
from corank.gates import Gates, Vector, language_loss, steps, train
from corank.gates.any_size import UnitMap
from corank.heal.distillation import Predictions
from corank.heal.lora import require_peft
from corank.heal.training import History
from corank.model import Calibration, ResidentModel
from corank.structured.allocation import Part
from corank.structured.block import Narrowed
from corank.structured.gated import fold_units, unit_place
from corank.structured.hidden import select_hidden
from corank.structured.narrow import keep_rows, put
from corank.structured.plan import Plan, blocks_of
from corank.structured.residual import Sliced
from corank.structured.shape import BlockShape, set_attributes
from corank.structured.task import Task
from corank.structured.units import CHANNELS, Units
from corank.structured.widths import parts_of


@dataclass(frozen=True)
class Field:
    """The gates of one hidden vector.

    Attributes:
        part: its units as the budget counts them; `part.block` is the place in `Plan.kept`.
        units: where they are.
        place: where the gates are.
    """

    part: Part
    units: Units
    place: Vector


@dataclass(frozen=True)
class Sizes:
    """What a model counts in the budget: (rest + sum of units + outside) times the share of the hidden size that is left.

    Attributes:
        each: name of a hidden vector -> parameters that go with a unit.
        units: parameters of all units.
        rest: of matrices of the blocks that no units can be taken out of.
        outside: of what lies around the blocks, where the budget counts it.
        limit: what all may count together.
    """

    each: Mapping[str, int]
    units: int
    rest: int
    outside: int
    limit: int

    @property
    def dense(self) -> int:
        """With all units and the whole hidden size."""
        return self.units + self.rest + self.outside

    def total(self, units: Mapping[str, Tensor], share: Tensor | float = 1.0) -> Tensor:
        """Expected parameters, a scalar.

        Args:
            units: name -> chance of every unit to stay [count].
            share: of the hidden size.
        """
        open_ = [self.each[name] * units[name].double().sum() for name in self.each]
        return (torch.stack(open_).sum() + self.rest + self.outside) * share

    def room(self, share: float = 1.0) -> int:
        """What the units may count, at the whole hidden size, if only a share of that is left."""
        return int(self.limit / share + 1e-6) - self.rest - self.outside


@dataclass(frozen=True)
class Case:
    """What a method that trains is given.

    Attributes:
        task: the model, in memory, and what is to become of it.
        plan: the widths that the budget alone would lead to.
        work: directory to continue from and to keep states in, None: not resumable.
        fields: hidden vectors whose units may go.
        sizes: how they count.
        blocks: the widths of the blocks that stay, as they are.
    """

    task: Task
    plan: Plan
    work: Path | None
    fields: tuple[Field, ...]
    sizes: Sizes
    blocks: tuple[BlockShape, ...]

    @classmethod
    def of(cls, task: Task, plan: Plan, work: Path | None = None, trains: bool = True) -> Case:
        """Find the units of a model, while its layers are plain.

        Args:
            task: what is to be done.
            plan: what the budget alone would lead to.
            work: directory of the run.
            trains: something is to be learned from its data.

        Raises:
            CorankError: no text to learn from, or a model that does not continue text.
        """
        learns = task.data is not None and not task.data.examples and task.source.model.can_generate()
        if trains and not learns:
            raise CorankError(
                "This method learns from text that the model continues; give a causal language model and text."
            )
        blocks, _, limit = blocks_of(task, plan.kept)
        fields = []
        for part in parts_of(task.recipe, blocks):
            units = blocks.narrow(part.block, part.kind)
            assert units is not None, "it has a part"
            fields.append(Field(part, units, unit_place(units, part.cost)))
        inside = sum(f.part.total for f in fields)
        outside = task.source.outline.parameters - sum(task.costs) if task.whole else 0
        each = {f.units.name: f.part.cost for f in fields}
        sizes = Sizes(each, inside, blocks.dense - inside, outside, limit + outside)
        case = cls(task, plan, work, tuple(fields), sizes, tuple(blocks.shapes))
        if task.data is None or not task.data.source.get("prompt_tokens"):
            return case
        return case.saying(
            "It was trained behind a prompt (see the data of this report), and has to be run behind the same."
        )

    def saying(self, sentence: str) -> Case:
        """The same with a warning for the report."""
        plan = dataclasses.replace(self.plan, skipped=(*self.plan.skipped, sentence))
        return dataclasses.replace(self, plan=plan)

    @property
    def source(self) -> ResidentModel:
        """The model."""
        return self.task.source

    @property
    def data(self) -> Calibration:
        """Sequences to learn from."""
        assert self.task.data is not None, "checked when the case was made"
        return self.task.data

    def matrices(self, roles: Sequence[str]) -> list[str]:
        """Paths of linear layers with some roles in the blocks that may change."""
        recipe, outline = self.task.recipe, self.source.outline
        protected = recipe.protected(self.task.layers)
        sites = [s for i in self.plan.kept if i not in protected for s in outline.in_layer(i)]
        return [s.name for s in sites if s.role in roles and s.form == "linear" and s.pool is None]

    def train(
        self,
        name: str,
        gates: Gates,
        count: int,
        minutes: float | None,
        rate: float,
        taught: Predictions | None = None,
        **how: Any,
    ) -> History:
        """Train gates that are not attached yet; see `corank.gates.train`.

        Args:
            name: of the file of the state.
            gates: on the model.
            count: steps, of `task.batch` sequences or of two, whichever is less.
            minutes: an earlier end by the clock, None for none.
            rate: learning rate of the gates.
            taught: predictions to learn; None: the text.
            how: other arguments.

        Raises:
            CorankError: the loss is not finite.
        """
        task, model = self.task, self.source.model
        skip = int(self.data.source.get("prompt_tokens", 0))
        if skip and taught is None:
            how["loss"] = lambda which: text_loss(self.source, self.data, which, skip)
        plan = steps(
            count,
            len(self.data.ids),
            batch=min(task.batch, 2),
            learning_rate=rate,
            minutes=minutes,
            seed=task.seed,
            precision="float32",
        )

        def report(done: int, of: int, value: float, size: float) -> None:
            task.report(min(done * task.layers // max(of, 1), task.layers - 1), "train", None)

        state = None if self.work is None else self.work / f"{name}.pt"
        with task.stage("train"), gates.attached(model):
            history = train(self.source, gates, self.data, plan, taught=taught, state=state, report=report, **how)
        if history.ended:
            raise CorankError(f"Training failed: {history.ended}; use a smaller learning rate.")
        return history


def text_loss(source: ResidentModel, data: Calibration, which: Sequence[int], skip: int = 0) -> Tensor:
    """Mean negative log-likelihood of the next token, where the first `skip` tokens of a sequence are only read."""
    if not skip:
        return language_loss(source, data, which)
    ids = data.ids[list(which)]
    logits = source.model(**source.complete({"input_ids": ids})).logits[:, skip - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, skip:].to(logits.device).flatten().long())


@dataclass(frozen=True, eq=False)
class Adapters:
    """LoRA beside some matrices: W + scale B A.

    Attributes:
        scale: of the product.
        parameters: "lora.PATH.A" [r, in] and "lora.PATH.B" [out, r].
    """

    scale: float = 0.0
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


@contextmanager
def adapters(model: Any, names: Sequence[str], rank: int, seed: int, alpha: float | None = None) -> Iterator[Adapters]:
    """Put LoRA adapters beside matrices, through PEFT; merge them at the end, or take them off after an error.

    Args:
        model: its matrices are plain again afterwards.
        names: of linear layers.
        rank: of the adapters; 0: none.
        seed: of their start.
        alpha: the scale is alpha / rank; None: 2 rank.

    Raises:
        CorankError: PEFT is not installed.
    """
    if rank < 1 or not names:
        yield Adapters()
        return
    peft, flags = require_peft(), [(p, p.requires_grad) for p in model.parameters()]
    alpha = 2.0 * rank if alpha is None else alpha
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        turned = any(is_conv1d(model.get_submodule(name)) for name in names)
        given = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "fan_in_fan_out": turned}
        config = peft.LoraConfig(target_modules=list(names), **given)
        wrapped = peft.get_peft_model(model, config)
    found = {}
    for name, p in wrapped.named_parameters():
        if ".lora_" in name:
            path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"lora.{path}.{part[0]}"] = p.requires_grad_(False)
    try:
        yield Adapters(alpha / rank, found)
    except BaseException:
        wrapped.unload()
        raise
    else:
        wrapped.merge_and_unload()
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@dataclass(frozen=True, eq=False)
class Masks:
    """What has been learned.

    Attributes:
        kept: name of a hidden vector -> units that stay, ascending, int64.
        values: name -> gates of all units [count]; 0 for those that go.
    """

    kept: dict[str, Tensor]
    values: dict[str, Tensor]

    @classmethod
    def hard(cls, kept: Mapping[str, Tensor], counts: Mapping[str, int]) -> Masks:
        """Gates of 1 for what stays."""
        values = {n: torch.zeros(counts[n]).index_fill(0, k, 1.0) for n, k in kept.items()}
        return cls(dict(kept), values)


@dataclass(frozen=True)
class Learned:
    """What has become of a model.

    Attributes:
        plan: with the widths that have been reached.
        narrowed: what became of each block, by its number in the source.
        sliced: what became of the residual stream, None if it is as it was.
        map: from which smaller models can be made, None if there is none.
    """

    plan: Plan
    narrowed: dict[int, Narrowed]
    sliced: Sliced | None = None
    map: UnitMap | None = None


@torch.no_grad()
def take_out(case: Case, masks: Masks, hidden: tuple[Tensor, Tensor] | None = None) -> Learned:
    """Leave only what stays, in place, with the gates of what stays in the weights: the masked model, smaller.

    Args:
        case: whose layers are plain again.
        masks: of the units.
        hidden: (dimensions of the residual stream that stay int64 [d'], gates of all of them [d]); None: all, ungated.
    """
    source = case.source
    fold_units(source.model, [f.units for f in case.fields], masks.values)
    shapes = list(case.blocks)
    for each in case.fields:
        place, units = each.part.block, each.units
        module = source.model.get_submodule(source.outline.path(case.plan.kept[place]))
        kept, before = masks.kept[units.name], shapes[place]
        if len(kept) == units.count:
            continue
        layer: Any = module.get_submodule(units.consumer)
        keep_rows(module, units, kept)
        columns = (kept[:, None] * units.size + torch.arange(units.size)).flatten()
        put(module, units.consumer, weight_of(layer)[:, columns], None if layer.bias is None else layer.bias.detach())
        shapes[place] = _with(before, units, len(kept))
        set_attributes(module, source.config, before, shapes[place])
    sliced = None
    if hidden is not None:
        select_hidden(source.model, source.outline, *hidden)
        sizes = {s.name: tuple(weight_of(source.model.get_submodule(s.name)).shape) for s in source.outline.sites}
        sliced = Sliced(len(hidden[0]), sizes, None)  # type: ignore[arg-type]
    narrowed = {layer: Narrowed(shape) for layer, shape in zip(case.plan.kept, shapes, strict=True)}
    return Learned(dataclasses.replace(case.plan, widths=tuple(shapes)), narrowed, sliced)


def _with(shape: BlockShape, units: Units, count: int) -> BlockShape:
    if units.kind == CHANNELS:
        return dataclasses.replace(shape, channels=count)
    return dataclasses.replace(shape, heads=count * (shape.heads // shape.kv_heads), kv_heads=count)
