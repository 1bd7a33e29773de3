"""PiSSA: a LoRA that starts as the principal singular components of W (Meng et al., NeurIPS 2024, arXiv:2404.02948).

    W = U S V^T;   B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T train,  W - B A is frozen

Trains: r (m + n) values. Needs: nothing. The module is PEFT's LoRA layer; at the end the difference from the start is
an ordinary LoRA of rank 2 r on the unchanged W. components="minor" is MiLoRA (arXiv:2406.09044): the last components.
"""

from __future__ import annotations

from torch import Tensor

from corank.adaptation import Adaptation, adapter
from corank.errors import unknown
from corank.linalg.components import components as part

COMPONENTS = ("principal", "minor")


@adapter("pissa", cite="arXiv:2404.02948")
def pissa(rank: int = 16, components: str = "principal") -> Adaptation:
    """LoRA that starts as the leading singular components of W, which are taken out of W.

    Args:
        rank: of the LoRA.
        components: "principal", or "minor" (MiLoRA).
    """
    if components not in COMPONENTS:
        raise unknown("kind of components", components, COMPONENTS)

    def choose(W: Tensor, measured: None, r: int) -> tuple[Tensor, Tensor]:
        return part(W, r, minor=components == "minor")

    return Adaptation("lora", rank, choose)
