"""LoRA on the factors, merged afterwards (Hu et al. 2021, arXiv:2106.09685; on factors: SVD-LLM, arXiv:2403.07378).

    min over the adapters of  E_t KL( p_t || q_t ),   A <- A + s D_A C_A,   B <- B + s D_B C_B        W' = B A

Rank and kind stay what they are: the adapters of both factors are added to them at the end, which costs nothing afterwards.
Much smaller gradients and moments than `kd`. Through PEFT. Of a CUR the link alone has an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from corank.errors import CorankError
from corank.factors import FactorizedLinear
from corank.heal.distillation import Predictions, batch_of, distil, taught_by
from corank.heal.lora import lora_config, require_peft
from corank.heal.training import History
from corank.heal.way import Case, Way

RANK, ALPHA = 8, 16.0


def adapted(case: Case, pick: Callable[[str], bool] = lambda part: True) -> list[str]:
    """Names of the parts that get an adapter.

    Args:
        case: its `what` is "matrices", the factors alone, or "blocks", also what stayed dense.
        pick: choice by the name of the part ("up", "down", ...) of a factorized layer.
    """
    require_peft()
    names = list(lora_config(case.student.model, RANK).target_modules or ())
    model = case.student.model
    chosen = []
    for name in names:
        owner, _, part = name.rpartition(".")
        factor = bool(owner) and isinstance(model.get_submodule(owner), FactorizedLinear)
        if (factor and pick(part)) or (not factor and case.what == "blocks"):
            chosen.append(name)
    return sorted(chosen)


def weights(case: Case) -> dict[str, nn.Parameter]:
    """The matrices that adapters are merged into."""
    found: dict[str, Any] = {f"{n}.weight": case.student.model.get_submodule(n).weight for n in adapted(case)}
    return found


def values(case: Case) -> int:
    """Values of all adapters."""
    return sum(RANK * sum(p.shape) for p in weights(case).values())


def train_adapters(case: Case, names: list[str], taught: Predictions, state: str) -> History:
    """Put adapters on some matrices, train them, and merge them; nothing is merged that does not help.

    Args:
        case: the model.
        names: of the matrices.
        taught: the teacher's predictions.
        state: name of the file of the state.
    """
    peft, model = require_peft(), case.student.model
    own = {n: model.get_submodule(n) for n in names}
    before = {n: layer.weight.detach().clone() for n, layer in own.items()}  # type: ignore[operator, union-attr]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.schedule.seed)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0)
        )
    try:
        parameters = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
        for p in parameters.values():
            p.requires_grad_(False)
        history = distil(case, parameters, state, taught)
        if history.best < history.heldout[0]:
            wrapped.merge_and_unload()
        else:
            wrapped.unload()
    except BaseException:
        wrapped.unload()
        raise
    merged = _judge(case, taught)
    if not (math.isfinite(merged) and merged <= history.heldout[0]):  # rounding of a 16-bit sum
        with torch.no_grad():
            for n, layer in own.items():
                layer.weight.copy_(before[n])  # type: ignore[operator, union-attr]
        merged = history.heldout[0]
    history.note(history.steps[-1], merged)
    history.kept = merged
    return history


def _judge(case: Case, taught: Predictions) -> float:
    """The divergence on held-out sequences."""
    total = count = 0.0
    with torch.no_grad():
        for i in case.heldout:
            tokens = taught.tokens([i])
            total += tokens * float(taught.divergence(case.student.model(**batch_of(case, [i])).logits, [i]))
            count += tokens
    return total / max(count, 1)


def run(case: Case) -> list[History]:
    """Adapters on all factors at once."""
    names = adapted(case)
    if not names:
        raise CorankError("This model has no factors to put adapters on; choose another way to heal it.")
    return [train_adapters(case, names, taught_by(case), "lora")]


WAY = Way(
    "kd of LoRA adapters on the factors, which are merged into them",
    run,
    weights,
    what=("matrices", "blocks"),
    learning_rate=1e-4,
    trained=values,
)
