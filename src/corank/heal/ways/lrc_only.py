"""Only the low-rank components train (WeLore, Jaiswal et al. 2024, arXiv:2407.11239).

    min over the factors alone of  E_t KL( p_t || q_t )

Gradients flow through the whole model; matrices that stayed dense, norms, biases and embeddings are frozen. The paper's
point: what could be compressed is what learns well, at a part of the memory of the gradients and moments.
The paper trains on the loss of the text itself (or of a task). Here the target is the dense model's prediction, so that
the model is brought back to what it was, and not towards the text it is healed with.
"""

from __future__ import annotations

from corank.heal.distillation import distil
from corank.heal.parameters import of_model
from corank.heal.training import History
from corank.heal.way import Case, Way


def run(case: Case) -> list[History]:
    """Train all factors at once."""
    return [distil(case, of_model(case.student, "matrices"), "lrc-only")]


WAY = Way(
    "kd of the factors alone; all that is dense is frozen",
    run,
    lambda case: of_model(case.student, "matrices"),
    what=("matrices",),
)
