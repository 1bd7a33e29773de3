"""CorDA: a LoRA that starts as components chosen by the inputs (Yang et al., NeurIPS 2024, arXiv:2406.05223).

    G = E[x x^T] on some text;   W = U (U^T W) with U the eigenvectors of W G W^T, so that U^T W x are the uncorrelated outputs
    by energy;   B A = U_r U_r^T W trains,  W - B A is frozen

Text of the task and components="principal" adapt what the task uses; text of what is to be remembered and
components="minor" adapt what that text uses least. Trains: r (m + n) values. Needs: calibration text.
Differs from the paper in the metric: it takes the SVD of W G and multiplies with G^-1 afterwards, which is not the best
approximation of the outputs, and fails on a singular G; published=True chooses the same components, without the inverse.
"""

from __future__ import annotations

from torch import Tensor

from corank.adaptation import Adaptation, adapter
from corank.errors import unknown
from corank.factorize import Measured
from corank.linalg.components import components as part
from corank.methods.adapters.pissa import COMPONENTS


@adapter("corda", cite="arXiv:2406.05223")
def corda(rank: int = 16, components: str = "principal", published: bool = False) -> Adaptation:
    """LoRA that starts as the components that matter most, or least, on a text, which are taken out of W.

    Args:
        rank: of the LoRA.
        components: "principal" (the paper's instruction-previewed mode) or "minor" (its knowledge-preserved one).
        published: choose by the SVD of W G, as the paper does, instead of by the energy of the outputs.
    """
    if components not in COMPONENTS:
        raise unknown("kind of components", components, COMPONENTS)

    def choose(W: Tensor, measured: Measured, r: int) -> tuple[Tensor, Tensor]:
        G = measured.gram.G.to(W.device)
        return part(W, r, G @ G if published else G, minor=components == "minor")

    return Adaptation("lora", rank, choose, statistics=("gram",), needs_data=True)
