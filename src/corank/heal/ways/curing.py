"""The healing of CURing: the links of CUR factors are trained, C and R stay (Park & Moon 2025, arXiv:2501.04211).

    min over the links M of  a CE + b T^2 KL(p_T || q_T) + c mean over l < L of || h_l - h'_l ||^2 / d

with CE the loss of the next token, p_T and q_T both models' predictions at temperature T, h_l and h'_l their hidden states
behind block l; a = 0.1, b = 0, c = 0.9, T = 10, AdamW at 3e-4, as in the paper. One sequence counts as much as another.

Where the reference code is wrong it is not followed: padding is no label and does not count in any of the three (there it
does in all), and what trains is what the layers declare (there every parameter with a capital U in its name).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from corank.heal.distillation import Predictions, batch_of, taught_by
from corank.heal.parameters import of_model
from corank.heal.states import student_states, teacher_states
from corank.heal.training import History, fit
from corank.heal.way import Case, Way

CE, KL, HIDDEN, TEMPERATURE = 0.1, 0.0, 0.9, 10.0
"""a, b, c and T."""


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Cross-entropy of the next token, for one sequence; neither padding nor what follows it is predicted.

    Args:
        logits: [tokens, vocabulary].
        ids: [tokens].
        mask: [tokens], True for real tokens, or None.
    """
    labels = ids[1:] if mask is None else ids[1:].masked_fill(~(mask[1:] & mask[:-1]), -100)
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = functional.cross_entropy(logits[:-1].to(wide), labels, reduction="sum", ignore_index=-100)
    return total / max(int((labels != -100).sum()), 1)


def hidden_loss(states: Sequence[Tensor], taught: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over blocks of the mean squared difference of hidden states, for one sequence.

    Args:
        states: blocks - 1 tensors [tokens, d], the student's.
        taught: [blocks - 1, tokens, d].
        mask: [tokens] or None.
    """
    wide = torch.promote_types(taught.dtype, torch.float32)
    if not len(states):
        return taught.new_zeros((), dtype=wide)
    difference = torch.stack([h.to(wide) for h in states]) - taught.to(wide)
    return difference.square().mean() if mask is None else difference[:, mask].square().mean()


def run(case: Case) -> list[History]:
    """Train the links, all at once."""
    with contextlib.ExitStack() as stack:
        taught = stack.enter_context(teacher_states(case))
        states = stack.enter_context(student_states(case.student))
        predicted = taught_by(case, TEMPERATURE) if KL else None
        return [_train(case, taught, states, predicted)]


def _train(case: Case, taught: Tensor, states: list[Tensor], predicted: Predictions | None) -> History:
    device = case.student.device

    def loss(which: Sequence[int]) -> Tensor:
        states.clear()
        batch = batch_of(case, which)
        logits = case.student.model(**batch).logits
        parts = []
        for row, i in enumerate(which):
            mask = None if case.data.mask is None else case.data.mask[i].to(device)
            own = [h[row] for h in states[:-1]]
            value = CE * next_token_loss(logits[row], batch["input_ids"][row], mask)
            value = value + HIDDEN * hidden_loss(own, taught[:, i].to(device), mask)
            if predicted is not None:
                value = value + KL * TEMPERATURE**2 * predicted.divergence(logits[row : row + 1], [i])
            parts.append(value)
        states.clear()
        return torch.stack(parts).mean()

    return fit(
        of_model(case.student, case.what),
        loss,
        case.learned,
        case.heldout,
        case.schedule,
        state=case.state("curing.pt"),
        report=lambda done, of, value: case.progress("healing", done, of, value),
        world=case.world,
    )


WAY = Way(
    "the links of CUR factors learn the dense model's hidden states, and the text",
    run,
    lambda case: of_model(case.student, case.what),
    what=("links", "matrices", "layers", "factors", "blocks"),
    measure="of CURing's loss (hidden states and next token)",
    learning_rate=3e-4,
    local=True,
)
