"""attach(): the one call that puts adapters on a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from corank.adaptation import Adaptation, adaptation
from corank.adapters.measuring import measured_inputs
from corank.adapters.targets import check_known, chosen, stacks
from corank.errors import CorankError
from corank.factorize import Measured
from corank.factors import FactorizedLinear, shape_of, weight_of
from corank.model import Calibration, Examples, Source, Text, calibration, read_text

if TYPE_CHECKING:
    from peft import PeftModel


def attach(
    model: PreTrainedModel,
    method: str = "curing",
    *,
    data: Source | Calibration | Iterable[Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    samples: int = 64,
    length: int = 512,
    batch: int = 8,
    targets: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    task_type: str | None = None,
    modules_to_save: Iterable[str] | None = None,
    **settings: Any,
) -> PeftModel:
    """Put adapters of one method on a model. It computes what it computed before, and only the adapters train.

    Args:
        model: in memory; its layers are wrapped in place.
        method: name of an adapter method, see `corank.adapters.adapters()`.
        data: calibration text (a file, ``datasets:NAME``, "builtin", or a `corank.model.Text`), drawn windows, or
            batches of model inputs; for methods that choose by the inputs. None: they choose by the weights alone,
            if they can.
        tokenizer: for text.
        samples, length, batch: windows, tokens in each, windows per forward pass.
        targets, ignore: roles (q, k, v, o, gate, up, down, ...), globs or ``re:`` patterns of the layers to adapt and to
            leave alone; None: every linear map but the head, none.
        ranks: role or pattern -> rank, where it is not to be the method's `rank`.
        seed: of methods that draw.
        task_type: as in PEFT, e.g. "CAUSAL_LM".
        modules_to_save: last names of modules that train as a whole, e.g. ["classifier"].
        settings: the method's parameters: rank, and others.

    Returns:
        A `peft.PeftModel`. It is saved by `corank.adapters.save`.

    Raises:
        CorankError: peft is not installed, unknown names, a rank larger than a matrix, a layer that the method cannot
            adapt, nothing that would train, no data where it is needed. The model has not been changed.
    """
    peft = require_peft()
    plan = adaptation(method, **settings)
    if isinstance(model, peft.PeftModel) or getattr(model, "peft_config", None):
        raise CorankError("The model has adapters already; merge or unload them first.")
    apart = list(modules_to_save or ())
    check_known("module to save", apart, model)
    rank_of = chosen(model, plan, targets, ignore, ranks or {}, apart)
    dense = [name for name in rank_of if not isinstance(model.get_submodule(name), FactorizedLinear)]
    measured: dict[str, Measured] = {}
    if plan.needs_data and data is None:
        raise CorankError(f"{method} chooses by the inputs; give data=TEXT and tokenizer=....")
    if data is not None and plan.statistics and dense:
        windows = _calibration(data, tokenizer, samples, length, seed)
        measured = measured_inputs(model, dense, plan, windows, batch, seed)
    common: dict[str, Any] = {
        "target_modules": list(rank_of),
        "task_type": task_type,
        "modules_to_save": apart or None,
    }
    if plan.form == "lora":
        from corank.adapters.starting import started

        return started(model, method, plan, rank_of, measured, common)
    return _with_cores(model, method, plan, rank_of, dense, measured, seed, common)


def _with_cores(
    model: PreTrainedModel,
    method: str,
    plan: Adaptation,
    rank_of: Mapping[str, int],
    dense: list[str],
    measured: Mapping[str, Measured],
    seed: int,
    common: Mapping[str, Any],
) -> PeftModel:
    import peft

    from corank.adapters.kind import CorankConfig, register_kind

    register_kind()
    groups = stacks(model, {name: rank_of[name] for name in dense}, plan.grouping) if plan.form == "stack" else []
    picked: dict[str, Any] = {}
    for names in groups or [[name] for name in dense]:
        if plan.choose is None:
            break
        weights = [wide(weight_of(model.get_submodule(name))) for name in names]
        rank = rank_of[names[0]]
        if plan.form == "stack":
            picked[names[0]] = plan.choose(weights, rank)
        else:
            picked[names[0]] = plan.choose(weights[0], measured.get(names[0]), rank, generator_for(seed, names[0]))
    config = CorankConfig(
        method=method,
        form=plan.form,
        rank=plan.rank,
        rank_pattern={name: rank for name, rank in rank_of.items() if rank != plan.rank},
        scale=plan.scale,
        stacks=groups,
        links=[name for name in rank_of if name not in dense],
        shapes={name: list(shape_of(model.get_submodule(name))) for name in rank_of},
        **common,
    )
    adapted = peft.get_peft_model(model, config)
    base: Any = adapted.get_base_model()
    for name, (rows, columns) in picked.items():
        base.get_submodule(name).choose("default", rows, columns)
    return adapted


def trainable(model: nn.Module) -> int:
    """Number of values that train; each is counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def wide(W: torch.Tensor) -> torch.Tensor:
    """A matrix in float32 at least."""
    return W.to(torch.promote_types(W.dtype, torch.float32))


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each layer, so that a choice does not depend on which other layers are chosen."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))


def _calibration(data: Any, tokenizer: Any, samples: int, length: int, seed: int) -> Calibration:
    if isinstance(data, Calibration):
        return data
    if isinstance(data, Examples):
        return data.calibration()
    if not isinstance(data, str | Text) and not hasattr(data, "__fspath__"):
        return Examples.of(data).calibration()
    if tokenizer is None:
        raise CorankError("Give tokenizer=..., which calibration text needs.")
    return calibration(tokenizer, read_text(data), samples, length, seed)


def require_peft() -> Any:
    """The package peft.

    Raises:
        CorankError: it is not installed; the extra that brings it is named.
    """
    try:
        import peft
    except ImportError:
        raise CorankError("Adapters need the package peft; install it with `pip install 'corank[train]'`.") from None
    return peft
