"""LPAF: prune by movement, factorize what is left, train factors and matrices in turn (Ren & Zhu 2024, arXiv:2306.14152).

    1. fine-tune with first-order pruning, S_ij = -sum_t w_ij dLoss/dw'_ij: the survivors have a low rank
    2. min || (W - B A) diag(d) ||_F over rank r, d from what survived in each column
    3. fine-tune; at each step each layer is W with probability p, else B A;  p falls to 0

Needs: a task, two fine-tunings. Stores: a factor pair. The paper has no code. What is not certain in it and was chosen here: d_j^2 =
1 + number of survivors in column j ("count"; or "score", the sum of their positive scores; or "none"); p falls linearly over
the first half; W stays as it is in the third step.

    pruning = prune(model, names, keep=0.25, steps=N)
    for t in range(N): train a step; pruning.step(t + 1)
    mixing = refine(model, pruning.finish(), ranks, steps=N)
    for t in range(N): mixing.draw(t); train a step
    mixing.finish()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from corank.errors import CorankError, unknown
from corank.factors import LowRank
from corank.linalg import truncate
from corank.training.mixed_rank import MixedRank
from corank.training.movement import MovementPruning, Pruned

WEIGHTINGS = ("count", "score", "none")


def prune(model: nn.Module, names: Iterable[str], keep: float, steps: int) -> MovementPruning:
    """Step 1: pruning during a fine-tuning of `steps` steps that leaves the share `keep` of each matrix."""
    return MovementPruning(model, names, keep, steps)


def column_weights(pruned: Pruned, weighting: str = "count") -> Tensor | None:
    """d^2 [n], None for equal weights."""
    if weighting not in WEIGHTINGS:
        raise unknown("weighting", weighting, WEIGHTINGS)
    if weighting == "none":
        return None
    if weighting == "count":
        return 1.0 + pruned.mask.double().sum(0)
    positive = (pruned.scores.double().clamp_min(0) * pruned.mask).sum(0)
    return positive.clamp_min(1e-6 * float(positive.max()) or 1.0)


def factorize(pruned: Pruned, rank: int, weighting: str = "count") -> LowRank:
    """Step 2: sparsity-aware SVD of a pruned matrix.

    Raises:
        CorankError: a rank larger than the matrix, or an unknown weighting.
    """
    if not 0 <= rank <= min(pruned.W.shape):
        raise CorankError(f"rank must be between 0 and {min(pruned.W.shape)}, got {rank}.")
    found = truncate(pruned.W.double(), column_weights(pruned, weighting), rank=rank)
    B, A = found.pair(pruned.W.double(), rank)
    return LowRank(B, A).astype(pruned.W.dtype)


def refine(
    model: nn.Module,
    pruned: Mapping[str, Pruned],
    ranks: Mapping[str, int],
    steps: int,
    weighting: str = "count",
    anneal: float = 0.5,
    seed: int = 0,
) -> MixedRank:
    """Step 3: mixed-rank fine-tuning of `steps` steps, from the factors of step 2."""
    parts = {name: (p.W, factorize(p, ranks[name], weighting)) for name, p in pruned.items()}
    return MixedRank(model, parts, steps, anneal, seed)
