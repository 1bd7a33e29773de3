"""Block refinement: every block learns the dense block's output from the inputs that it will really see.

    min over the block's factors, norms and biases of  || f_l(h) - f'_l(h') ||^2 / || f_l(h) ||^2

with h the dense model's hidden state and h' that of the model compressed and refined up to block l - 1. As in the
block-wise stage of SVD-LLM's successors (L2), in AA-SVD (arXiv:2604.02119) and in BRECQ (arXiv:2102.05426). A basis that
other blocks read as well is left alone.
"""

from __future__ import annotations

from corank.heal.blocks import Visit, by_blocks, parameters_by_blocks
from corank.heal.training import History, fit
from corank.heal.way import Case, Way


def refine(visit: Visit) -> History:
    """Train one block."""
    case = visit.case
    held, rest = case.heldout, case.learned
    return fit(visit.parameters, visit.error, rest, held, case.schedule, state=visit.state(), world=case.world)


def run(case: Case) -> list[History]:
    """Train one block after the other."""
    return by_blocks(case, refine)


WAY = Way(
    "every block learns the dense block's output from the inputs it will really see; local",
    run,
    parameters_by_blocks,
    measure="of the blocks' output, squared",
    local=True,
    by_blocks=True,
)
