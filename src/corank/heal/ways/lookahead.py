"""Block refinement that looks one block ahead: errors count by what the next block makes of them.

    min over the block's factors, norms and biases of  e(f_l(h), f'_l(h')) + e(g(f_l(h)), g(f'_l(h'))),   g = f_{l+1}

with e(y, z) = || y - z ||^2 / || y ||^2, h and h' the hidden states of the dense model and of the model healed up to block
l - 1, and g the next dense block, frozen; the last block looks at its own output alone. The hidden states of a
transformer have directions that the next block reads and others that it does not, and `block` weighs them alike.
After the second level (L2) of block-wise refinement, which reads a KL through a trained probe where this has the squared
error; that would need logits of every block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from corank.heal.blocks import Visit, by_blocks, parameters_by_blocks, squared
from corank.heal.training import History, fit
from corank.heal.way import Case, Way


def refine(visit: Visit) -> History:
    """Train one block."""
    case, layer = visit.case, visit.layer + 1
    with contextlib.ExitStack() as stack:
        if layer < case.teacher.outline.layers:
            ahead = stack.enter_context(case.teacher.block(layer))
            with torch.no_grad():
                goals = [visit.goal.run(ahead, layer, i, h) for i, h in enumerate(visit.after)]
            scale = sum(float(squared(y, visit.goal.mask(i))) for i, y in enumerate(goals)) / len(goals)

        def loss(which: Sequence[int]) -> Tensor:
            if layer == case.teacher.outline.layers:
                return visit.error(which)
            parts = []
            for i in which:
                mask, made = visit.goal.mask(i), visit.seen.run(visit.block, visit.layer, i)
                behind = visit.goal.run(ahead, layer, i, made.to(visit.after[i].dtype))
                own = squared(visit.after[i] - made, mask) / max(visit.scale, 1e-30)
                parts.append(own + squared(goals[i] - behind, mask) / max(scale, 1e-30))
            return torch.stack(parts).mean()

        rest, held = case.learned, case.heldout
        return fit(visit.parameters, loss, rest, held, case.schedule, state=visit.state(), world=case.world)


def run(case: Case) -> list[History]:
    """Train one block after the other."""
    return by_blocks(case, refine)


WAY = Way(
    "as block, and what the next dense block makes of that output; local",
    run,
    parameters_by_blocks,
    measure="of the outputs of a block and the next, squared",
    local=True,
    by_blocks=True,
)
