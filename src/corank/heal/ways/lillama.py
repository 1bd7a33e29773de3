"""Low-rank feature distillation (Lillama, arXiv:2412.16719; the mode of that name in CURing's code).

    min over the factors of W'_i and its bias of  mean of l(y_i, W'_i x_i + b'_i) and l(y_i, W'_i x^_i + b'_i),
    l(y, z) = mean |y - z| - log sigmoid(cos(y, z)),   y_i = W_i x_i + b_i

x_i is what the matrix reads in the dense model (the teacher's path), x^_i what it reads in the compressed one as it is at
that moment (the student's). All matrices of a block at once, none with a gradient beyond itself. Padding does not count.
The learning rate rises and falls as everywhere here; the original keeps it constant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from corank.heal.blocks import by_blocks, parameters_by_blocks
from corank.heal.training import History
from corank.heal.way import Case, Way
from corank.heal.ways.local import train_matrices


def feature_loss(y: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean |y - z| minus log sigmoid of the cosine, over the real rows of [..., d]."""
    wide = torch.promote_types(z.dtype, torch.float32)
    y, z = y.to(wide), z.to(wide)
    if mask is not None:
        y, z = y[mask], z[mask]
    return (y - z).abs().mean() - functional.logsigmoid(functional.cosine_similarity(y, z, dim=-1)).mean()


def both_paths(layer: nn.Module, x: Tensor, seen: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """The loss on the teacher's and on the student's input, in equal parts."""
    return 0.5 * (feature_loss(y, layer(x.to(seen.dtype)), mask) + feature_loss(y, layer(seen), mask))


def run(case: Case) -> list[History]:
    """One block after the other."""
    return by_blocks(case, lambda visit: train_matrices(visit, both_paths))


WAY = Way(
    "every factorized matrix learns the dense matrix's output, in size and direction, from both models' inputs; local",
    run,
    parameters_by_blocks,
    what=("layers", "matrices", "links"),
    measure="of distance and direction of the matrices' outputs",
    learning_rate=1e-4,
    local=True,
    by_blocks=True,
)
