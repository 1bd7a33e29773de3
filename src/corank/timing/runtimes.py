"""How a model is run: what a layer launches besides its matrices, and which matrices go together in one launch."""

from __future__ import annotations

import dataclasses

from corank.errors import unknown


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One way to run a model, as the time model sees it.

    Attributes:
        name: of the tier.
        others: launches of a layer that are not matrix products: attention, norms, rotary embedding, activation, residuals.
        packed: matrices that read the same input are one product, and so are the second factors behind it.
        middle: second factors of gate and up, activation and first factor of down are one kernel.
        host: every launch is queued by the host, so that the device may have to wait for it.
        copies_cache: the key-value cache is copied to append to it (`torch.cat`), as eager PyTorch does.
        kernel_scale: factor on the device's cost of a launch (kernels that start before their predecessor has ended).
    """

    name: str
    others: int
    packed: bool = False
    middle: bool = False
    host: bool = False
    copies_cache: bool = False
    kernel_scale: float = 1.0


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("eager", others=29, host=True, copies_cache=True),
        Runtime("graph", others=6),
        Runtime("packed", others=5, packed=True),
        Runtime("triton", others=4, packed=True, middle=True, kernel_scale=0.8),
    )
}
"""Plain PyTorch, as transformers' Llama runs in it; a compiled CUDA graph of the step; the same with packed matrices; the same
with fused kernels."""


def find_runtime(runtime: str | Runtime) -> Runtime:
    """A runtime by name.

    Raises:
        CorankError: there is none of that name; the nearest are suggested.
    """
    if isinstance(runtime, Runtime):
        return runtime
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES)
    return RUNTIMES[runtime]
