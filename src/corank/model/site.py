"""A site: one matrix of a model; and choosing among sites."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from corank.errors import CorankError, unknown
from corank.model.archs import FUSED


@dataclass(frozen=True)
class Site:
    """One matrix of the model, W: [out, in].

    Attributes:
        name: dotted path of its module, e.g. ``model.layers.3.self_attn.q_proj``.
        role: q, k, v, o, gate, up, down, qkv, gate_up, conv, embed, lm_head, or the module's own leaf name.
        layer: index of the visit in which the engine treats it: its block, or one past the last block.
        shape: (m, n) = (out, in), whatever way the storage is transposed.
        group: name of the first site that reads the same input tensor; sites of a group share statistics.
        bias: whether the layer has a bias.
        form: "linear", "conv" (the matrix is applied to patches) or "embedding" (to indicators of tokens).
        outside: it lies before or behind the blocks and is compressed only when it is asked for.
        pool: for a matrix of an expert, what the same matrices of all experts of the layer have in common.
        share: fraction of the tokens that pass through it: below 1 for experts.
        depth: number of its block where `layer` is not that (models that run as a whole).
        decoder: its input has the decoder's tokens (encoder-decoder models).
        tied: path of the embedding that is the same matrix transposed and is factorized with it.
        refusal: why it cannot be factorized, None if it can.
    """

    name: str
    role: str
    layer: int
    shape: tuple[int, int]
    group: str
    bias: bool
    form: str = "linear"
    outside: bool = False
    pool: str | None = None
    share: float = 1.0
    depth: int | None = None
    decoder: bool = False
    tied: str | None = None
    refusal: str | None = None

    @property
    def numel(self) -> int:
        """Entries of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def flops(self) -> int:
        """Operations per token (per position, for a convolution) of the dense matrix; a lookup costs none."""
        return 0 if self.form == "embedding" else round(2 * self.numel * self.share)

    @property
    def block(self) -> int | None:
        """Number of its block, None outside the blocks."""
        return None if self.outside else self.layer if self.depth is None else self.depth


def select_sites(
    sites: Sequence[Site],
    targets: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
    optional: Sequence[Site] = (),
) -> list[Site]:
    """Choose sites by role, by glob on the name, or by regular expression (``re:...``).

    ``expert`` matches all matrices of experts, ``embed`` also the head of a model in which both are one matrix.

    Args:
        sites: the candidates.
        targets: keep a site that any of these matches; None keeps all of `sites`.
        ignore: drop a site that any of these matches.
        optional: further candidates, only for what is named in `targets`.

    Raises:
        CorankError: a pattern matches no site (the nearest roles and names are suggested), or one that cannot be
            factorized.
    """
    every = [*sites, *optional]

    def matching(pattern: str) -> set[str]:
        if pattern.startswith("re:"):
            found = {s.name for s in every if re.search(pattern[3:], s.name)}
        else:
            found = {s.name for s in every if pattern in _labels(s) or fnmatch.fnmatchcase(s.name, pattern)}
        if not found:
            known = {s.role for s in every} | {s.name for s in every}
            raise unknown("role or site", pattern, known)
        return found

    kept = {s.name for s in sites} if targets is None else set().union(*(matching(t) for t in targets))
    for pattern in ignore or ():
        kept -= matching(pattern)
    for site in every:
        if site.name in kept and site.refusal:
            raise CorankError(site.refusal)
    return [s for s in every if s.name in kept]


def _labels(site: Site) -> set[str]:
    labels = {site.role}
    if site.pool is not None:
        labels.add("expert")
    if site.tied is not None:
        labels |= {"embed", site.tied}
    return labels


def sites_with_roles(sites: Sequence[Site], roles: Iterable[str]) -> list[Site]:
    """Sites of some roles, in any architecture.

    A fused matrix counts as the role that stands for it, and in an MLP without a gate the first matrix counts as one.
    """
    wanted = set(roles)
    gated = any(s.role in ("gate", "gate_up") for s in sites)

    def counts_as(site: Site) -> str:
        return "gate" if site.role == "up" and not gated else FUSED.get(site.role, site.role)

    return [s for s in sites if s.role in wanted or counts_as(s) in wanted]
