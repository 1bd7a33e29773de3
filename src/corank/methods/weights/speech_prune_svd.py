"""Unstructured pruning, then low-rank factors of the sparse matrices (Wang & Zhang 2024, doi:10.1109/JSTSP.2024.3433616).

    1. fine-tune W with a mask M:  loss + eta mean ||M * W||_* / ||W||_*,   first-order or magnitude, by a cubic schedule
    2. M * W = U S V^T;  y = U S^1/2 (z * S^1/2 V^T x);  learn which directions go:  loss + lambda (m + n) sum of open z
    3. B = U_r S_r^1/2,  A = S_r^1/2 V_r^T;  the sparse matrix itself where r (m + n) >= m n

Needs: `steps` forward and backward passes with the model in memory, on text, or on whatever the model takes in (sound: a list
of dicts); labels among them are used, else the model learns what it put out before. Stores: a factor pair, or the matrix
with its zeros. It is made for encoders of speech (wav2vec2, Whisper), and works on any linear layers. The paper has no code,
and only its outline is public: the formulas are ours. The nuclear norm penalises one matrix in eight at a step, in turn;
gates open and close straight through and begin in the order of what the directions carry; the budget ends the selection and
cuts what is left over. What pruning takes away has to be learned back: a few dozen steps do so for little, and density=1,
which leaves the nuclear norm alone, then loses least. The paper fine-tunes the factors once more: corank heal does, on text.
Losses in the report are those of the factors against the pruned and trained matrices, not against the dense ones.
"""

from __future__ import annotations

from corank.recipe import Recipe, register
from corank.rule import RankChoice
from corank.training.sparse_rank import SparseRank


def learned(choice: RankChoice) -> dict[str, int]:
    """Stands for the ranks that training will name."""
    raise AssertionError("the model has not been trained")


@register("speech-prune-svd", family="weights", cite="doi:10.1109/JSTSP.2024.3433616")
def speech_prune_svd(density: float = 0.7, by: str = "magnitude", nuclear: float = 0.1, rate: float = 5e-5) -> Recipe:
    """Weights are pruned while the model is trained, and what is left is decomposed at ranks that are learned.

    Args:
        density: share of the weights of each matrix that is left before it is decomposed.
        by: what says which weights go, "magnitude", or "first-order", the movement of weights, which needs hundreds of steps.
        nuclear: weight of the nuclear norm, which makes ranks fall.
        rate: learning rate of the weights.
    """
    return Recipe(rule=learned, train=SparseRank(density, by, nuclear, rate), steps=40)
