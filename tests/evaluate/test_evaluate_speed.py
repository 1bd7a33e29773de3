from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from corank.errors import CorankError
from corank.evaluate import Bound, count_flops, measure_bound, speed, weight_bytes

BOUND = Bound(flops_per_s=1e12, bytes_per_s=1e11, device="cpu", dtype="float32", threads=1)


def llama_flops(config, tokens: int, keys: int, scores: int) -> int:
    """FLOPs of `tokens` new positions against `keys` positions each, output scores for `scores` of them."""
    d, h = config.hidden_size, config.intermediate_size
    head = d // config.num_attention_heads
    kv = config.num_key_value_heads * head
    layer = 2 * tokens * (2 * d * d + 2 * d * kv + 3 * d * h) + 4 * tokens * keys * d
    return config.num_hidden_layers * layer + 2 * scores * d * config.vocab_size


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_equal_the_formula(make_model, attention):
    model = make_model(attn_implementation=attention)
    ids = torch.randint(12, (3, 20))
    rotary = 2 * 20 * (model.config.head_dim // 2)  # the outer product of positions and frequencies
    counted = count_flops(model, input_ids=ids)
    assert counted - 3 * llama_flops(model.config, 20, 20, 20) in (0, rotary, 3 * rotary)


def test_rows_hold_the_counts_and_the_fraction_of_the_bound(model):
    (row,) = speed({"dense": model}, 16, 3, (2,), 2, bound=BOUND)
    config = model.config
    rotary = 2 * (config.head_dim // 2)
    assert row.prefill_flops_per_token * 32 == pytest.approx(2 * llama_flops(config, 16, 16, 1), abs=32 * rotary)
    assert row.decode_flops_per_token == pytest.approx(llama_flops(config, 1, 16, 1), abs=2 * rotary)
    assert row.weight_bytes == weight_bytes(model)
    seconds = max(row.decode_flops_per_token * 2 / 1e12, row.weight_bytes / 1e11)
    assert row.decode_bound == pytest.approx(seconds / (2 / row.decode_tokens_per_s))
    seconds = max(row.prefill_flops_per_token * 32 / 1e12, row.weight_bytes / 1e11)
    assert row.prefill_bound == pytest.approx(seconds / (32 / row.prefill_tokens_per_s))
    assert dataclasses.asdict(row.bound) == row.to_json()["bound"]


def test_the_first_model_is_the_measure_of_the_others(make_model):
    rows = speed({"dense": make_model(), "small": make_model(num_hidden_layers=1)}, 8, 2, (1, 3), 3, bound=BOUND)
    assert [(r.model, r.batch) for r in rows] == [("dense", 1), ("small", 1), ("dense", 3), ("small", 3)]
    for row in rows:
        for kind in ("prefill", "decode"):
            rates = [getattr(row, f"{kind}_{end}") for end in ("min", "tokens_per_s", "max")]
            ratios = [getattr(row, f"{kind}_ratio{end}") for end in ("_min", "", "_max")]
            assert 0 < rates[0] <= rates[1] <= rates[2] and 0 < ratios[0] <= ratios[1] <= ratios[2]
            assert row.model != "dense" or ratios == [1.0, 1.0, 1.0]


def test_models_take_turns_and_decode_with_the_cache(make_model):
    calls: list[tuple[str, tuple[int, ...], int]] = []
    models = {name: make_model() for name in ("x", "y")}
    for name, model in models.items():

        def note(module, args, kwargs, name=name):
            past = kwargs.get("past_key_values")
            calls.append((name, tuple(kwargs["input_ids"].shape), past.get_seq_length() if past else 0))

        model.register_forward_pre_hook(note, with_kwargs=True)
    speed(models, prompt_tokens=6, new_tokens=2, repeats=2, warmup=1, bound=BOUND)
    prefills = [name for name, shape, past in calls if past == 0 and shape == (1, 6)]
    assert prefills[:6] == ["x", "y", "y", "x", "x", "y"]  # the order rotates
    run = calls[:3]
    assert [(shape, past) for _, shape, past in run] == [((1, 6), 0), ((1, 1), 6), ((1, 1), 7)]


def test_weight_bytes(make_model):
    loose, tied = make_model(), make_model(tie_word_embeddings=True)
    table = 12 * 16 * 4
    rest = sum(p.numel() for n, p in loose.named_parameters() if "embed" not in n and "lm_head" not in n) * 4
    buffers = sum(b.numel() * b.element_size() for b in loose.buffers())
    assert weight_bytes(loose) == rest + table + buffers  # the output matrix, not the rows looked up
    assert weight_bytes(tied) == rest + table + buffers  # one matrix, read once
    assert weight_bytes(nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 2, bias=False))) == 64
    shared = nn.Linear(4, 4, bias=False)
    assert weight_bytes(nn.ModuleList([shared, shared])) == 64
    assert weight_bytes(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)) == 32


def test_modes_are_restored(model):
    model.train()
    speed({"dense": model}, 4, 1, repeats=1, bound=BOUND)
    assert model.training


def test_a_bound_is_measured_and_is_a_roofline():
    bound = measure_bound(size=64, copy_bytes=1 << 16)
    assert 0 < bound.flops_per_s < float("inf") and 0 < bound.bytes_per_s < float("inf")
    assert bound.device == "cpu" and bound.dtype == "float32" and bound.threads == torch.get_num_threads()
    assert BOUND.seconds(1e12, 1) == 1.0 and BOUND.seconds(1, 2e11) == 2.0
    with pytest.raises(CorankError, match="floating"):
        measure_bound(dtype=torch.int8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": {}}, "no model"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"repeats": 0}, "repeats"),
        ({"warmup": -1}, "warmup"),
        ({"batch_sizes": ()}, "batch size"),
        ({"batch_sizes": (1, 0)}, "batch size"),
        ({"prompt_tokens": 64}, "context of 64"),
    ],
)
def test_bad_input_says_what_to_do(model, settings, message):
    arguments = {"models": {"dense": model}, "prompt_tokens": 4, "new_tokens": 1, "bound": BOUND} | settings
    with pytest.raises(CorankError, match=message):
        speed(**arguments)
