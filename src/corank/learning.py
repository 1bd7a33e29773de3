"""How the order is learned in which components of matrices are given up (allocate=acip): data of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from corank.errors import CorankError, unknown

LOSSES = ("kd", "text")
PRIORS = ("energy", "none")


@dataclass(frozen=True)
class Learning:
    """How gates on components are trained.

    Attributes:
        to: training ends when this share of the parameters is left; what is still open then is ranked by its gates.
        loss: "kd", the divergence from the dense model's predictions, or "text", the loss on the text.
        prior: gates begin in the order of what the components carry per parameter ("energy"), or all alike ("none").

    Raises:
        CorankError: a value is out of range.
    """

    to: float = 0.4
    loss: str = "kd"
    prior: str = "energy"

    def __post_init__(self) -> None:
        if not 0 < self.to < 1:
            raise CorankError(f"to={self.to} should be between 0 and 1: the share of the parameters to train down to.")
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if self.prior not in PRIORS:
            raise unknown("prior", self.prior, PRIORS)
