"""How long a step of a model should take on a device: the sum over its kernels of t0 + max(bytes / bandwidth, flops / peak).

Where the host queues every kernel (eager PyTorch on a GPU) a step takes no less than its launches times what it costs to
queue one: such a step is as long at every rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from corank.errors import CorankError
from corank.model import Site
from corank.timing.anatomy import Anatomy, Model, anatomy
from corank.timing.device import Device
from corank.timing.kernels import Kernel, Move, Parts, Product, kernels_of, parts_from, together
from corank.timing.runtimes import Runtime, find_runtime

MODES = ("decode", "prefill")
GATES = ("gate", "up", "gate_up")
PAYS = 1.05
"""A predicted speed-up below this is none: what such a model saves is memory."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted time of one step.

    Attributes:
        model: its name.
        device, runtime: where and how.
        mode: "decode", one new token per sequence, or "prefill", a whole prompt.
        batch: sequences.
        context: tokens in the cache before the step, or of the prompt.
        kernels: of the whole step, in order.
    """

    model: str
    device: Device
    runtime: Runtime
    mode: str
    batch: int
    context: int
    kernels: tuple[Kernel, ...]

    @property
    def tokens(self) -> int:
        """Vectors that the matrices are applied to."""
        return self.batch * (1 if self.mode == "decode" else self.context)

    @property
    def launches(self) -> float:
        """Kernels launched."""
        return sum(k.launches for k in self.kernels)

    @property
    def flops(self) -> float:
        """Operations, 2 per multiply-add."""
        return sum(k.flops for k in self.kernels)

    @property
    def nbytes(self) -> float:
        """Bytes read and written."""
        return sum(k.nbytes for k in self.kernels)

    @property
    def floor(self) -> float:
        """Seconds that bytes and operations take on their own: in decoding, those of the bytes."""
        return sum(k.floor(self.device) for k in self.kernels)

    @property
    def seconds(self) -> float:
        """Predicted seconds of the step."""
        scaled = dataclasses.replace(self.device, kernel_s=self.device.kernel_s * self.runtime.kernel_scale)
        busy = sum(k.seconds(scaled) for k in self.kernels)
        return max(busy, self.launches * self.device.launch_s) if self.runtime.host else busy

    @property
    def fraction(self) -> float:
        """Of the predicted time, the part that is not launches."""
        return self.floor / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Over the whole batch."""
        return self.tokens / self.seconds

    def only(self, *what: str) -> Prediction:
        """The same of some kernels, e.g. ``only("linear")``: the matrices inside the blocks."""
        return dataclasses.replace(self, kernels=tuple(k for k in self.kernels if k.what in what))

    def to_json(self, kernels: bool = False) -> dict[str, Any]:
        """Totals as a dict; with the list of kernels if asked for."""
        shown: dict[str, Any] = {
            "model": self.model,
            "device": self.device.to_json(),
            "runtime": self.runtime.name,
            "mode": self.mode,
            "batch": self.batch,
            "context": self.context,
            "launches": self.launches,
            "flops": self.flops,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "floor_seconds": self.floor,
            "fraction_of_floor": self.fraction,
            "tokens_per_s": self.tokens_per_s,
        }
        if kernels:
            shown["kernels"] = [{**dataclasses.asdict(k), "seconds": k.seconds(self.device)} for k in self.kernels]
        return shown


def predict(
    model: Model | Anatomy,
    device: Device,
    batch: int = 1,
    context: int = 0,
    mode: str = "decode",
    runtime: str | Runtime = "eager",
    *,
    plan: Any = None,
) -> Prediction:
    """Predict one step of a model from its configuration alone.

    Args:
        model: in memory, a configuration, a path or name, or an `Anatomy`; no weight is read.
        device: where, see `find_device`.
        batch: sequences.
        context: tokens of each sequence in the cache before the step (decode), or in the prompt (prefill).
        mode: "decode" or "prefill".
        runtime: a key of `RUNTIMES`, or a `Runtime`.
        plan: a `corank.budget.Plan`: what the matrices are to become; None: as they are.

    Raises:
        CorankError: an unknown name, a meaningless number, or decoding with a model that does not.
    """
    found, how = anatomy(model, plan), find_runtime(runtime)
    if mode not in MODES:
        raise CorankError(f"mode={mode!r} is neither decode nor prefill.")
    if batch < 1 or context < (mode == "prefill"):
        raise CorankError("A prediction needs a batch of at least 1, and in prefill a context of at least 1 token.")
    if mode == "decode" and not found.causal:
        raise CorankError(f"{found.name} does not generate text token by token; predict mode='prefill' instead.")
    tokens = batch * (1 if mode == "decode" else context)
    scored = batch if found.causal else tokens  # of a prompt only the last position is scored
    kernels: list[Kernel] = []
    for site in (s for s in found.sites if s.outside and s.form == "embedding"):
        kernels += _lookup(found, site, tokens, device)
    for i, (_, sites) in enumerate(itertools.groupby(found.inside(), key=lambda s: s.block)):
        block = list(sites)
        linears = _packed(found, block, tokens, device, how) if how.packed else _apart(found, block, tokens, device)
        kernels += linears + _others(found, block, i, tokens, batch, context, mode, device, how)
    kernels.append(_pass("norm", found.hidden, tokens, device))
    for site in (s for s in found.sites if s.outside and s.form != "embedding"):
        many = scored if site.role == "lm_head" else tokens
        kernels += kernels_of(_parts(found, site), many, device, site.name, "head")
    return Prediction(found.name, device, how, mode, batch, context, tuple(kernels))


def _parts(found: Anatomy, site: Site) -> Parts:
    spec = found.spec(site)
    return Parts((Product(site.name, *site.shape),)) if spec is None else parts_from(spec, site.name)


def _lookup(found: Anatomy, site: Site, tokens: int, device: Device) -> list[Kernel]:
    """Rows of a table; a factorized one is narrower, and a product follows."""
    spec = found.spec(site)
    width = site.shape[0] if spec is None else int(spec["rank"])
    lookup = Kernel(site.name, "embedding", 0, 2 * tokens * width * device.itemsize)
    return [lookup, *(kernels_of(_parts(found, site), tokens, device, site.name, "embedding") if spec else [])]


def _routed(site: Site, tokens: int) -> tuple[float, float]:
    """(probability that an expert is used, tokens it then has)."""
    used = 1 - (1 - site.share) ** tokens if site.share < 1 else 1.0
    return used, tokens * site.share / used if used else 0.0


def _expected(kernels: Sequence[Kernel], used: float) -> list[Kernel]:
    if used == 1:
        return list(kernels)
    return [
        Kernel(k.name, k.what, k.flops * used, k.nbytes * used, k.launches * used, k.weight_bytes * used)
        for k in kernels
    ]


def _apart(found: Anatomy, block: Sequence[Site], tokens: int, device: Device) -> list[Kernel]:
    """Every product on its own."""
    kernels = []
    for site in block:
        used, many = _routed(site, tokens)
        kernels += _expected(kernels_of(_parts(found, site), many, device, site.name), used)
    return kernels


def _packed(found: Anatomy, block: Sequence[Site], tokens: int, device: Device, how: Runtime) -> list[Kernel]:
    """The first products of siblings as one kernel, then their second ones as one."""
    steps: list[tuple[set[str], bool, Kernel]] = []
    for _, members in itertools.groupby(block, key=lambda s: s.group):
        sites = list(members)
        parts = [_parts(found, site) for site in sites]
        used, many = _routed(sites[0], tokens)
        roles, name = {site.role for site in sites}, "+".join(site.role for site in sites)
        depth = max(len(p.products) for p in parts)
        for i in range(depth):
            stage = [p.products[i] for p in parts if len(p.products) > i]
            label = name if depth == 1 else f"{name} ({i + 1} of {depth})"
            kernel = together(stage, many, device, label, one_input=i == 0)
            whole = all(len(p.products) == 2 for p in parts)
            steps.append((roles, whole, _expected([kernel], used)[0]))
        move = Move(
            sum(p.move.launches for p in parts),
            sum(p.move.values for p in parts),
            sum(p.move.indices for p in parts),
        )
        if move.launches:
            steps.append((roles, False, _expected([move.kernel(name, many, device)], used)[0]))
    return _with_middle(block, steps, tokens, device) if how.middle else [kernel for _, _, kernel in steps]


def _with_middle(
    block: Sequence[Site], steps: Sequence[tuple[set[str], bool, Kernel]], tokens: int, device: Device
) -> list[Kernel]:
    """Second factors of gate and up, activation and first factor of down as one kernel: the wide activation stays inside."""
    kernels: list[Kernel] = []
    gates = sum(s.shape[0] for s in block if s.role in GATES)
    wide = sum(s.shape[1] for s in block if s.role == "down")
    i = 0
    while i < len(steps):
        roles, whole, kernel = steps[i]
        follows = i + 1 < len(steps) and steps[i + 1][0] == {"down"} and steps[i + 1][1]
        if whole and roles <= set(GATES) and kernel.name.endswith("(2 of 2)") and follows:
            down = steps[i + 1][2]
            inside = tokens * (gates + wide) * device.itemsize
            weights = kernel.weight_bytes + down.weight_bytes
            nbytes = kernel.nbytes + down.nbytes - inside
            kernels.append(Kernel("middle", "linear", kernel.flops + down.flops, nbytes, 1, weights))
            i += 2
        else:
            kernels.append(kernel)
            i += 1
    return kernels


def _others(
    found: Anatomy,
    block: Sequence[Site],
    index: int,
    tokens: int,
    batch: int,
    context: int,
    mode: str,
    device: Device,
    how: Runtime,
) -> list[Kernel]:
    """Attention, and what is element-wise: the activation, and passes over the residual stream."""
    kernels = []
    left = how.others
    if found.heads:
        kernels += _attention(found, index, batch, context, mode, device, how)
        left -= 1
    wide = sum(s.shape[0] for s in block if s.role in GATES) + sum(s.shape[1] for s in block if s.role == "down")
    if wide and not how.middle and left > 0:
        kernels.append(Kernel("activation", "other", 0, tokens * wide * device.itemsize))
        left -= 1
    if left > 0:
        kernels.append(_pass("norms, rotary embedding, residuals", found.hidden, tokens, device, left))
    return kernels


def _attention(
    found: Anatomy, index: int, batch: int, context: int, mode: str, device: Device, how: Runtime
) -> list[Kernel]:
    """Scores and their sums: the cache is read once, and of a prompt half of the scores are masked."""
    window = found.windows[index] if index < len(found.windows) else None
    new = 1 if mode == "decode" else context
    if mode == "decode":
        seen = float(context if window is None else min(context, window))
    else:
        seen = (context + 1) / 2 if found.causal else float(context)
        seen = seen if window is None else min(seen, window)
    cached = seen if mode == "decode" else context
    keys = 2 * batch * cached * found.kv_heads * found.head_dim * device.itemsize
    width = found.heads * found.head_dim
    flops = 4 * batch * new * seen * width
    kernels = [Kernel("attention", "attention", flops, keys + 2 * batch * new * width * device.itemsize)]
    if how.copies_cache and mode == "decode" and context:
        kernels.append(Kernel("cache", "cache", 0, 2 * keys, 0))  # its launches are among the others
    return kernels


def _pass(name: str, width: int, tokens: int, device: Device, launches: int = 1) -> Kernel:
    return Kernel(name, "other", 0, launches * 2 * tokens * width * device.itemsize, launches)
