"""Tokens per second of several models side by side, prefill and decoding apart.

The machine is never quite the same twice, so the models take turns repeat by repeat, in rotating order, and
each is compared with the first within the same repeat. Every number is a median and comes with the extremes:
a ratio whose extremes lie on both sides of 1 is not a speed-up. Beside each rate stands the fraction of the
bound of this very device (``evaluate.bound``), which says whether there was anything left to win.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from corank.errors import CorankError
from corank.evaluate.bound import Bound, count_flops, measure_bound, synchronize, weight_bytes
from corank.evaluate.perplexity import context_length, input_device
from corank.timing import Device, anatomy, this_device
from corank.timing import predict as predicted


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """One model at one batch size. Rates are tokens per second over the whole batch, medians over repeats.

    Attributes:
        model: its name.
        prefill_ratio, decode_ratio: this model's rate over the first model's in the same repeat (median,
            extremes).
        weight_bytes: bytes of weights one forward pass reads.
        prefill_flops_per_token, decode_flops_per_token: matrix products and attention; the latter at the
            context length ``prompt_tokens``.
        prefill_bound, decode_bound: fraction of the device's bound reached. It can exceed 1 where the weights
            fit in the caches, which are faster than the memory copy that set the bound.
        bound: the rates of the device, see :class:`~corank.evaluate.bound.Bound`.
        prefill_predicted, decode_predicted: tokens per second by the time model, None if it was not asked.
        prefill_floor, decode_floor: fraction reached of what bytes and operations alone would allow, by the time model.
    """

    model: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str
    dtype: str
    prefill_tokens_per_s: float
    prefill_min: float
    prefill_max: float
    prefill_ratio: float
    prefill_ratio_min: float
    prefill_ratio_max: float
    decode_tokens_per_s: float
    decode_min: float
    decode_max: float
    decode_ratio: float
    decode_ratio_min: float
    decode_ratio_max: float
    weight_bytes: int
    prefill_flops_per_token: float
    decode_flops_per_token: float
    prefill_bound: float
    decode_bound: float
    bound: Bound
    prefill_predicted: float | None = None
    decode_predicted: float | None = None
    prefill_floor: float | None = None
    decode_floor: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict, ``bound`` as a nested one."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Case:
    """A model ready to be timed at one batch size."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    ids: torch.Tensor
    last: dict[str, int]


def speed(
    models: Mapping[str, nn.Module],
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 5,
    *,
    warmup: int = 1,
    seed: int = 0,
    bound: Bound | None = None,
    predict: bool | Device = False,
) -> list[SpeedRow]:
    """Time prefill and greedy decoding with the KV cache.

    Args:
        models: name -> causal language model; the first is what the others are compared with.
        prompt_tokens: length of the prompt, of random token ids, >= 1.
        new_tokens: decoding steps timed after it, >= 1.
        batch_sizes: one row per model and batch size.
        repeats: timed repeats per row.
        warmup: untimed repeats before them.
        seed: seed of the token ids.
        bound: the device's rates if already measured; else they are measured once per device and dtype.
        predict: also say what the time model predicts, on this machine's device (measured once, see
            `corank.timing.this_device`), or on one that is given.

    Returns:
        Rows ordered by batch size, then as in ``models``.

    Raises:
        CorankError: no model, a meaningless number, or a prompt and continuation beyond a model's context.
    """
    if not models:
        raise CorankError("There is no model to time; give speed({'dense': model, ...}).")
    if not batch_sizes:
        raise CorankError("There is no batch size to time; give e.g. batch_sizes=(1, 8).")
    least = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "warmup": warmup + 1,
    }
    for name, value in {**least, "every batch size": min(batch_sizes)}.items():
        if value < 1:
            raise CorankError(f"{name} is too small; give {0 if name == 'warmup' else 1} or more.")
    for name, model in models.items():
        context = context_length(model)
        if context is not None and prompt_tokens + new_tokens > context:
            raise CorankError(
                f"{name!r} has a context of {context} positions and prompt_tokens + new_tokens is "
                f"{prompt_tokens + new_tokens}; give fewer."
            )
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        with torch.no_grad():
            rows = _rows(models, prompt_tokens, new_tokens, batch_sizes, repeats, warmup, seed, bound)
        return rows if predict is False else [_with_prediction(row, models[row.model], predict) for row in rows]
    finally:
        for name, model in models.items():
            model.train(training[name])


def _rows(
    models: Mapping[str, nn.Module],
    prompt_tokens: int,
    new_tokens: int,
    batch_sizes: Sequence[int],
    repeats: int,
    warmup: int,
    seed: int,
    bound: Bound | None,
) -> list[SpeedRow]:
    names = list(models)
    bounds: dict[tuple[torch.device, torch.dtype], Bound] = {}
    rows: list[SpeedRow] = []
    for batch in batch_sizes:
        cases = {name: _case(models[name], batch, prompt_tokens, seed) for name in names}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for repeat in range(warmup + repeats):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                timed = _time(cases[name], new_tokens)
                if repeat >= warmup:
                    seconds[name].append(timed)
        for name in names:
            case = cases[name]
            key = (case.device, case.dtype)
            if key not in bounds:
                bounds[key] = bound or measure_bound(case.device, case.dtype)
            rows.append(_row(name, case, new_tokens, seconds[name], seconds[names[0]], bounds[key]))
    return rows


def _row(
    name: str,
    case: _Case,
    new_tokens: int,
    seconds: list[tuple[float, float]],
    first: list[tuple[float, float]],
    bound: Bound,
) -> SpeedRow:
    batch, prompt_tokens = case.ids.shape
    prefill = [batch * prompt_tokens / s[0] for s in seconds]
    decode = [batch * new_tokens / s[1] for s in seconds]
    prefill_ratio = [f[0] / s[0] for f, s in zip(first, seconds, strict=True)]
    decode_ratio = [f[1] / s[1] for f, s in zip(first, seconds, strict=True)]
    prefill_flops, decode_flops = _flops(case)
    weights = weight_bytes(case.model)
    prefill_rate, decode_rate = statistics.median(prefill), statistics.median(decode)
    return SpeedRow(
        model=name,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=len(seconds),
        device=_device_name(case.device),
        dtype=str(case.dtype).removeprefix("torch."),
        prefill_tokens_per_s=prefill_rate,
        prefill_min=min(prefill),
        prefill_max=max(prefill),
        prefill_ratio=statistics.median(prefill_ratio),
        prefill_ratio_min=min(prefill_ratio),
        prefill_ratio_max=max(prefill_ratio),
        decode_tokens_per_s=decode_rate,
        decode_min=min(decode),
        decode_max=max(decode),
        decode_ratio=statistics.median(decode_ratio),
        decode_ratio_min=min(decode_ratio),
        decode_ratio_max=max(decode_ratio),
        weight_bytes=weights,
        prefill_flops_per_token=prefill_flops / (batch * prompt_tokens),
        decode_flops_per_token=decode_flops / batch,
        prefill_bound=bound.seconds(prefill_flops, weights) * prefill_rate / (batch * prompt_tokens),
        decode_bound=bound.seconds(decode_flops, weights) * decode_rate / batch,
        bound=bound,
    )


def _with_prediction(row: SpeedRow, model: Any, device: bool | Device) -> SpeedRow:
    """The row beside what the time model says of eager PyTorch."""
    found = anatomy(model)
    if not isinstance(device, Device):
        floating = [p.dtype for p in model.parameters() if p.dtype.is_floating_point]
        device = this_device(input_device(model), floating[-1] if floating else torch.float32)
    prefill = predicted(found, device, row.batch, row.prompt_tokens, "prefill")
    decode = predicted(found, device, row.batch, row.prompt_tokens + row.new_tokens // 2, "decode")
    return dataclasses.replace(
        row,
        prefill_predicted=prefill.tokens_per_s,
        decode_predicted=decode.tokens_per_s,
        prefill_floor=prefill.floor * row.prefill_tokens_per_s / prefill.tokens,
        decode_floor=decode.floor * row.decode_tokens_per_s / decode.tokens,
    )


def _case(model: nn.Module, batch: int, prompt_tokens: int, seed: int) -> _Case:
    device = input_device(model)
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch, prompt_tokens), generator=generator).to(device)
    floating = [p.dtype for p in model.parameters() if p.dtype.is_floating_point]
    # A server needs the scores of the last position only; a model that can leave the others out is asked to.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return _Case(model, device, floating[-1] if floating else torch.float32, ids, last)


def _time(case: _Case, new_tokens: int) -> tuple[float, float]:
    """Seconds of (prefill, decoding) of one run."""
    synchronize(case.device)
    started = time.perf_counter()
    output = case.model(input_ids=case.ids, use_cache=True, **case.last)
    synchronize(case.device)
    filled = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = case.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **case.last)
    synchronize(case.device)
    done = time.perf_counter()
    return filled - started, done - filled


def _flops(case: _Case) -> tuple[int, int]:
    """FLOPs of (the prefill, one decoding step after it), for the whole batch."""
    prefill = count_flops(case.model, input_ids=case.ids, use_cache=True, **case.last)
    past = None
    if case.ids.shape[1] > 1:
        past = case.model(input_ids=case.ids[:, :-1], use_cache=True, **case.last).past_key_values
    step = {"input_ids": case.ids[:, -1:], "past_key_values": past, "use_cache": True}
    decode = count_flops(case.model, **step, **case.last)
    return prefill, decode


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
