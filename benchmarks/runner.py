"""Variants of one model, ready to be timed side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.allowance import Allowance, OutOfTime, within
from benchmarks.shapes import own_copy, shared_copy
from corank.errors import CorankError
from corank.runtime import TIERS
from corank.runtime.peak import peak_activation


class Runner:
    """One variant of a model, ready to be timed.

    Args:
        model: in eval mode.
        compiled: compile it; decoding then uses a static cache of `length` positions.
        length: prompt and new tokens together.
    """

    def __init__(self, model: Any, compiled: bool, length: int) -> None:
        self.model, self.length = model, length
        self.static = compiled and model.config.model_type != "bert"
        self.call = torch.compile(model, dynamic=False) if compiled else model
        self.decodes = model.config.model_type != "bert"
        self.cache: Any = None
        self.out: Any = None

    def prefill(self, ids: torch.Tensor) -> None:
        """One pass over the prompt."""
        if not self.decodes:
            self.call(input_ids=ids)
            return
        if self.static:
            from transformers import StaticCache

            if self.cache is None:  # one for all runs: a compiled model is compiled for it
                self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)
            self.cache.reset()
        self.out = self.call(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def decode(self, steps: int) -> None:
        """Greedy steps behind the prompt."""
        for _ in range(steps):
            token = self.out.logits[:, -1:].argmax(dim=-1)
            self.out = self.call(
                input_ids=token, past_key_values=self.out.past_key_values, use_cache=True, logits_to_keep=1
            )


def variants(dense: Any, small: Any, length: int, compiled: bool, tiers: Sequence[str]) -> dict[str, Runner]:
    """Every row of a table, the dense model first; weights are shared between rows of one model."""
    found = {"dense": Runner(dense, False, length)}
    if compiled:
        found["dense compiled"] = Runner(shared_copy(dense), True, length)
    for tier in tiers:
        try:
            model = TIERS[tier](own_copy(small))
        except CorankError as error:  # a runtime that this machine has not
            print(f"{tier} left out: {error}")
            continue
        found["factorized" if tier == "torch" else f"factorized {tier}"] = Runner(model, False, length)
    if compiled:
        found["factorized compiled"] = Runner(shared_copy(small), True, length)
    return found


def head_alone(model: Any, batch: int) -> Callable[[], Any] | None:
    """The output matrix on its own, as every step applies it: to one position of each sequence."""
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else None
    if head is None:
        return None
    x = torch.randn(batch, 1, head.weight.shape[1], dtype=head.weight.dtype)
    return lambda: head(x)


def warmed(
    runners: dict[str, Runner], ids: torch.Tensor, steps: int, allowance: Allowance
) -> dict[str, dict[str, int]]:
    """Peak memory of every runner, each now ready; compiled ones that are not ready in time are taken out."""
    peaks = {}
    for label in list(runners):
        # the others come first, so that no time is missing for what must be there
        if not label.endswith("compiled"):
            peaks[label] = _peaks(runners[label], ids)
    for label in [label for label in runners if label.endswith("compiled")]:
        try:
            with within(allowance.part(0.35)):
                peaks[label] = _peaks(runners[label], ids)
                if runners[label].decodes:  # once as it will be timed; a static cache has no room for more
                    runners[label].prefill(ids)
                    runners[label].decode(steps)
        except OutOfTime:
            print(f"{label} left out: compiling takes too long for the time that is allowed", flush=True)
            del runners[label]
        except Exception as error:  # the compiler has errors of many classes; no C++ compiler is one of them
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            print(f"{label} left out: it does not compile here: {reason}", flush=True)
            del runners[label]
    return peaks


def _peaks(runner: Runner, ids: torch.Tensor) -> dict[str, int]:
    """Bytes of activations, and of the cache, alive at once; the run also warms everything up."""
    runner.prefill(ids)
    found = {"prefill": peak_activation(lambda: runner.prefill(ids))}
    if runner.decodes:
        runner.decode(1)
        found["decode"] = peak_activation(lambda: runner.decode(1))
    return found


def decoding(
    runners: Mapping[str, Runner],
    head: Callable[[], Any] | None,
    ids: torch.Tensor,
    steps: int,
    repeats: int,
    allowance: Allowance,
) -> dict[str, list[float]]:
    """Seconds of one step, and of its output matrix; the prompt is not counted."""
    names, seconds = list(runners), {name: [] for name in runners}
    if head is not None:
        seconds["head"] = []
    for repeat in range(repeats):
        before = allowance.left
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            runners[name].prefill(ids)
            started = time.perf_counter()
            runners[name].decode(steps)
            seconds[name].append((time.perf_counter() - started) / steps)
        if head is not None:
            started = time.perf_counter()
            for _ in range(steps):
                head()
            seconds["head"].append((time.perf_counter() - started) / steps)
        left = allowance.left
        if not left or before - left > left:
            break
    return seconds
