"""MoRA: a square matrix in place of two thin ones (Jiang et al. 2024, arXiv:2405.12130), the baseline of CURing's comparison.

    r' = even(sqrt(r (m + n)));  x is cut into ceil(n / r') pieces [r'] (wrapping around), piece g is rotated by the angles of
    RoPE at position g, multiplied by M [r', r'], and the results one after the other are the output (cut to m, or repeated)

Trains: r'^2 values, about as many as a LoRA of rank r. Needs: nothing. This is type 6 of the reference code, the one
its authors advise for small ranks and the one CURing compares with. There an odd r' is an error; here it is rounded down.
"""

from __future__ import annotations

from corank.adaptation import Adaptation, adapter


@adapter("mora", cite="arXiv:2405.12130")
def mora(rank: int = 8) -> Adaptation:
    """Square matrix between parameter-free maps, of as many parameters as a LoRA.

    Args:
        rank: of the LoRA with that many parameters.
    """
    return Adaptation("rotation", rank)
