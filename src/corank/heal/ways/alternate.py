"""The input factors first, then the output factors (A, then B).

    min over A of  E_t KL( p_t || q_t ),  then  min over B of the same        W' = B A

Half of the training each; what trains has half the gradients and moments of `kd` on both, and neither factor has to
follow a moving other. A is `down`; B is `up`, with the links of CUR factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from corank.heal.distillation import distil, taught_by
from corank.heal.parameters import of_model
from corank.heal.training import History
from corank.heal.way import Case, Way


def halves(parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(input factors, all others)."""
    first = {n: p for n, p in parameters.items() if n.split(".")[-2:-1] == ["down"]}
    return first, {n: p for n, p in parameters.items() if n not in first}


def run(case: Case) -> list[History]:
    """Two trainings of half the length."""
    taught, plan = taught_by(case), case.schedule
    minutes = None if plan.minutes is None else plan.minutes / 2
    half = replace(case, schedule=replace(plan, epochs=plan.epochs / 2, minutes=minutes))
    parts = zip(("alternate-a", "alternate-b"), halves(of_model(case.student, "matrices")), strict=True)
    return [distil(half, part, name, taught) for name, part in parts]


WAY = Way(
    "kd of the input factors, then of the output factors",
    run,
    lambda case: of_model(case.student, "matrices"),
    what=("matrices",),
)
