"""Full-model distillation: the compressed model learns the next-token distribution of the dense one.

    min over the factors, norms and biases of  E_t KL( p_t || q_t )

The teacher goes through once, a block at a time, and leaves its most likely tokens behind (`corank.heal.distillation`).
Student and teacher need nothing in common but their tokens: a model with fewer or narrower layers learns as well.
Hinton et al., arXiv:1503.02531.
"""

from __future__ import annotations

from corank.heal.distillation import distil
from corank.heal.parameters import of_model
from corank.heal.training import History
from corank.heal.way import Case, Way


def run(case: Case) -> list[History]:
    """Train all of them at once."""
    return [distil(case, of_model(case.student, case.what), "kd")]


WAY = Way(
    "the whole model learns the dense model's distribution of the next token",
    run,
    lambda case: of_model(case.student, case.what),
)
