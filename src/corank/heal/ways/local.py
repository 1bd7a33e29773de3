"""Every factorized matrix learns what the dense one puts out (local MSE, after CURing's `local_mse`, arXiv:2501.04211).

    min over the factors of W'_i and its bias of  || y_i - (W'_i x^_i + b'_i) ||^2 / || y_i ||^2,   y_i = W_i x_i + b_i

x_i is what the matrix reads in the dense model, x^_i what it reads in the compressed one as it is at that moment. All
matrices of a block at once, each with a gradient of its own: none reaches beyond its matrix. Padding does not count, and
every matrix counts the same however large its outputs are (the reference code adds up squared errors as they come).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from corank.factors import weight_of
from corank.heal.blocks import Visit, by_blocks, matrices, parameters_by_blocks, squared
from corank.heal.training import History, fit
from corank.heal.way import Case, Way

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(layer, dense input, input it will see, dense output, mask of rows) -> loss."""


def relative_error(layer: nn.Module, x: Tensor, seen: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """|| y - layer(seen) ||^2 / || y ||^2 over the real rows."""
    return squared(y - layer(seen), mask) / squared(y, mask).clamp_min(1e-30)


def train_matrices(visit: Visit, loss: Loss) -> History:
    """Train the factorized matrices of one block, each by its own loss; what is reported is the mean of them."""
    case, paths = visit.case, matrices(visit.block, visit.dense)
    prefixes = tuple(f"{path}." for path in paths)
    parameters = {n: p for n, p in visit.parameters.items() if n.startswith(prefixes)}
    if not parameters:
        paths = []

    def total(which: Sequence[int]) -> Tensor:
        parts = []
        for i in which:
            for path, (x, seen, mask) in visit.inputs(i, paths).items():
                if seen.numel() and (mask is None or bool(mask.any())):  # an expert may be given no token
                    with torch.no_grad():
                        y = dense_output(visit.dense.get_submodule(path), x)
                    parts.append(loss(visit.block.get_submodule(path), x, seen, y, mask))
        return torch.stack(parts).sum() / (len(paths) * len(which)) if parts else torch.zeros(())

    schedule = case.schedule if paths else replace(case.schedule, epochs=0)
    return fit(parameters, total, case.learned, case.heldout, schedule, state=visit.state(), world=case.world)


def dense_output(layer: nn.Module, x: Tensor) -> Tensor:
    """W x + b of a dense layer."""
    bias = getattr(layer, "bias", None)
    y = x @ weight_of(layer).mT
    return y if bias is None else y + bias


def run(case: Case) -> list[History]:
    """One block after the other."""
    return by_blocks(case, lambda visit: train_matrices(visit, relative_error))


WAY = Way(
    "every factorized matrix learns the dense matrix's output; local",
    run,
    parameters_by_blocks,
    what=("layers", "matrices", "links"),
    measure="of the matrices' outputs, squared",
    learning_rate=1e-4,
    local=True,
    by_blocks=True,
)
