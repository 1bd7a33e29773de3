"""Generation with a static cache and every step as one compiled graph.

A step of decoding launches hundreds of small kernels, and on a GPU in eager mode the processor cannot launch them as
fast as they run. transformers compiles the step into one graph, which CUDA replays with a single launch, when the cache
has a fixed size; this asks for it, in every call of `generate` that does not ask for something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from corank.runtime.override import Override, note, overrides
from corank.runtime.packing import Stack


class GraphGeneration(Override):
    """`model.generate` with a static cache and compiled steps.

    Args:
        module: the model.
        backend: of torch.compile; None is inductor, with CUDA graphs. On a CPU nothing is compiled unless one is named:
            there a launch costs nothing, and compiling takes longer than most texts.
    """

    def __init__(self, module: Any, backend: str | Callable[..., Any] | None = None):
        super().__init__(module, "generate")
        self.backend = backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.module
        asked = {"past_key_values", "cache_implementation", "compile_config", "use_cache", "assistant_model"} & set(
            kwargs
        )
        on_cpu = model.device.type == "cpu"
        if asked or (on_cpu and self.backend is None):
            note(
                "generation is not compiled: "
                + (f"{sorted(asked)[0]} is given" if asked else "the model is on the CPU")
            )
            return self.original(*args, **kwargs)
        if not getattr(model, "_can_compile_fullgraph", False):
            note(f"generation is not compiled: {type(model).__name__} is not one graph")
            return self.original(*args, **kwargs)
        from transformers import CompileConfig

        config = (
            CompileConfig(fullgraph=True, mode="reduce-overhead")
            if self.backend is None
            else CompileConfig(fullgraph=True, backend=self.backend)
        )
        config._compile_all_devices = on_cpu
        with frozen(model):
            return self.original(*args, cache_implementation="static", compile_config=config, **kwargs)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, a compiler may rely on the packed weights of a model: they are in place and nobody moves them."""
    stacks: list[Stack] = []
    seen: set[int] = set()
    for override in overrides(model):
        siblings = getattr(override, "siblings", None) or getattr(getattr(override, "family", None), "siblings", None)
        if siblings is not None and id(siblings) not in seen:
            seen.add(id(siblings))
            stacks += siblings.freeze()
    try:
        yield
    finally:
        for stack in stacks:
            stack.frozen = None


def graphs(model: Any, backend: str | Callable[..., Any] | None = None) -> list[Override]:
    """The override of `generate`; none for a model that cannot."""
    if not callable(getattr(type(model), "generate", None)):
        note(f"{type(model).__name__} does not generate; it runs as it is")
        return []
    return [GraphGeneration(model, backend)]
