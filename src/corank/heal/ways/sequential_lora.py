"""LoRA on the output factors, merged, then on the input factors, merged (SVD-LLM, arXiv:2403.07378).

    min over adapters of B  E_t KL( p_t || q_t ),  then  min over adapters of A of the same        W' = B A

The paper adapts one factor while the other is frozen, because adapting both at once moves a product of two unknowns. It
trains on instructions for their own loss; here the target is the dense model's prediction. B is `up` or the link of a CUR.
"""

from __future__ import annotations

from dataclasses import replace

from corank.heal.distillation import taught_by
from corank.heal.training import History
from corank.heal.way import Case, Way
from corank.heal.ways.lora import adapted, train_adapters, values, weights


def run(case: Case) -> list[History]:
    """Two trainings of half the length."""
    taught, plan = taught_by(case), case.schedule
    minutes = None if plan.minutes is None else plan.minutes / 2
    half = replace(case, schedule=replace(plan, epochs=plan.epochs / 2, minutes=minutes))
    outer, inner = adapted(case, lambda part: part != "down"), adapted(case, lambda part: part == "down")
    parts = (("lora-b", outer), ("lora-a", inner))
    return [train_adapters(half, names, taught, state) for state, names in parts if names]


WAY = Way(
    "kd of LoRA adapters on the output factors, then on the input factors, merged",
    run,
    weights,
    what=("matrices",),
    learning_rate=1e-4,
    trained=values,
)
