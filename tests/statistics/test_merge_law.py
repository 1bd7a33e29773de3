"""What holds for every statistic: splits, merges, masks, saved states, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corank.errors import CorankError
from corank.statistics import STATISTICS, NonFinite

B, T, M, N = 7, 5, 4, 3
NAMES = sorted(STATISTICS)
SIZES = {
    "gram": (N,),
    "moments": (N,),
    "cross": (N,),
    "fisher": (M, N),
    "gradient-mean": (M, N),
    "gradient": (M,),
    "clipped-gradient": (M,),
    "angular": (),
}
WIDTHS = {
    "gram": (N,),
    "moments": (N,),
    "cross": (N, N),
    "fisher": (N, M),
    "gradient-mean": (N, M),
    "gradient": (M,),
    "clipped-gradient": (M,),
    "angular": (N, N),
}


def fresh(name, **options):
    return STATISTICS[name](*SIZES[name], **options)


def batch(name, seed=0, dtype=torch.float64, samples=B):
    generator = torch.Generator().manual_seed(seed)
    streams = [torch.randn(samples, T, w, generator=generator, dtype=torch.float64) for w in WIDTHS[name]]
    mask = torch.rand(samples, T, generator=generator) < 0.6
    mask[0] = False  # a sample of padding alone
    mask[1] = True
    return [(s + 0.3).to(dtype) for s in streams], mask


def measured(name, streams, mask, cuts=()):
    edges = [0, *sorted(cuts), len(mask)]
    parts = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        part = fresh(name)
        part.update(*(s[start:stop] for s in streams), mask[start:stop])
        parts.append(part)
    return parts


def values(statistic):
    result = statistic.result()
    fields = [result] if isinstance(result, float) else list(vars(result).values())
    return [torch.as_tensor(field, dtype=torch.float64) for field in fields]


def assert_same(left, right, rtol=1e-12):
    assert left.count == right.count
    for a, b in zip(values(left), values(right), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, B - 1)), order=st.randoms(use_true_random=False))
def test_any_split_and_any_merge_tree_equals_one_batch(name, cuts, order):
    streams, mask = batch(name)
    whole = fresh(name)
    whole.update(*streams, mask)
    parts = measured(name, streams, mask, cuts)
    while len(parts) > 1:
        left = parts.pop(order.randrange(len(parts)))
        right = parts.pop(order.randrange(len(parts)))
        parts.append(left.merge(right))
    assert_same(parts[0], whole)


@pytest.mark.parametrize("name", NAMES)
def test_one_statistic_fed_batch_by_batch_equals_one_batch(name):
    streams, mask = batch(name)
    whole, streamed = fresh(name), fresh(name)
    whole.update(*streams, mask)
    for b in range(B):
        streamed.update(*(s[b : b + 1] for s in streams), mask[b : b + 1])
    assert_same(streamed, whole)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_have_exactly_no_influence(name, garbage):
    streams, mask = batch(name)
    clean, dirty = fresh(name), fresh(name)
    clean.update(*streams, mask)
    spoilt = [s.masked_fill(~mask[..., None], garbage) for s in streams]
    dirty.update(*spoilt, mask)
    assert dirty.count == clean.count
    for a, b in zip(values(clean), values(dirty), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_padding_to_a_longer_batch_changes_nothing(name):
    streams, _ = batch(name)
    bare, right, left = fresh(name), fresh(name), fresh(name)
    bare.update(*streams)
    padding = [torch.full_like(s, float("nan")) for s in streams]
    real = torch.ones(B, T, dtype=torch.bool)
    after = torch.cat([real, ~real], 1)
    right.update(*(torch.cat([s, p], 1) for s, p in zip(streams, padding, strict=True)), after)
    left.update(*(torch.cat([p, s], 1) for s, p in zip(streams, padding, strict=True)), after.flip(1))
    assert_same(right, bare)
    assert_same(left, bare)


@pytest.mark.parametrize("name", NAMES)
def test_an_integer_attention_mask_means_the_same(name):
    streams, mask = batch(name)
    boolean, integer = fresh(name), fresh(name)
    boolean.update(*streams, mask)
    integer.update(*streams, mask.long())
    assert_same(integer, boolean, rtol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_padding_alone_changes_nothing(name):
    streams, mask = batch(name)
    statistic = fresh(name)
    statistic.update(*streams, torch.zeros_like(mask))
    assert statistic.count == 0
    with pytest.raises(CorankError, match="no data"):
        statistic.result()
    statistic.update(*streams, mask)
    reference = fresh(name)
    reference.update(*streams, mask)
    assert_same(statistic, reference, rtol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_resume_from_a_saved_state(name):
    streams, mask = batch(name)
    whole, first = fresh(name), fresh(name)
    whole.update(*streams, mask)
    first.update(*(s[:3] for s in streams), mask[:3])
    state = first.state()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    resumed = STATISTICS[name].from_state(state)
    resumed.update(*(s[3:] for s in streams), mask[3:])
    assert_same(resumed, whole)
    untouched = fresh(name)
    untouched.update(*(s[:3] for s in streams), mask[:3])
    assert_same(first, untouched, rtol=0.0)  # resuming copied the state


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_statistic_saves_and_merges(name):
    streams, mask = batch(name)
    seen = fresh(name)
    seen.update(*streams, mask)
    restored = STATISTICS[name].from_state(fresh(name).state())
    assert restored.count == 0
    assert_same(restored.merge(seen), seen, rtol=0.0)
    assert_same(fresh(name).merge(fresh(name)).merge(seen), seen, rtol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_state_is_refused(name):
    state = fresh(name).state()
    state.pop("count")
    with pytest.raises(CorankError, match="lacks count"):
        STATISTICS[name].from_state(state)
    state = fresh(name).state()
    first = next(iter(state))
    state[first] = torch.zeros(2, 3, 4)
    with pytest.raises(CorankError, match=first):
        STATISTICS[name].from_state(state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_real_tokens_raise_and_leave_no_trace(name, bad):
    streams, mask = batch(name)
    mask[1] = True
    for which in range(len(streams)):
        statistic = fresh(name)
        statistic.update(*streams, mask)
        before = values(statistic)
        spoilt = [s.clone() for s in streams]
        spoilt[which][1, 2, 0] = bad  # a real token, not the last of its sample
        with pytest.raises(NonFinite) as caught:
            statistic.update(*spoilt, mask)
        assert isinstance(caught.value, CorankError)
        for a, b in zip(before, values(statistic), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_inputs_are_upcast_exactly(name, dtype):
    streams, mask = batch(name, dtype=dtype)
    low, exact = fresh(name), fresh(name)
    low.update(*streams, mask)
    exact.update(*(s.double() for s in streams), mask)
    assert all(v.dtype == torch.float64 for v in low.state().values() if v.is_floating_point())
    assert_same(low, exact, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("name", ["gram", "moments", "cross", "fisher", "gradient", "gradient-mean"])
def test_values_whose_squares_leave_float32_are_still_exact(name, scale):
    streams, mask = batch(name, dtype=torch.float32)
    scaled, exact = fresh(name), fresh(name)
    scaled.update(*((s * scale) for s in streams), mask)
    exact.update(*((s * scale).double() for s in streams), mask)
    assert_same(scaled, exact, rtol=1e-12)
    assert all((v != 0).any() for v in values(scaled))


@pytest.mark.parametrize("name", NAMES)
def test_long_batches_are_cut_into_blocks(name, monkeypatch):
    streams, mask = batch(name)
    whole, cut = fresh(name), fresh(name)
    whole.update(*streams, mask)
    monkeypatch.setattr("corank.statistics.tokens.FLUSH", 2)
    cut.update(*streams, mask)
    assert_same(cut, whole)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_autograd_and_inference_mode_do_not_matter(name):
    streams, mask = batch(name, dtype=torch.float32)
    plain, wrapped = fresh(name), fresh(name)
    plain.update(*streams, mask)
    plain.update(*streams, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wrapped.update(*(s.clone().requires_grad_() for s in streams), mask)
    other = fresh(name)
    with torch.inference_mode():
        other.update(*(s.clone() for s in streams), mask)
    wrapped.merge(other)
    other.update(*streams, mask)  # buffers made in inference mode can be added to outside of it
    assert_same(wrapped, plain, rtol=1e-12)
    assert not any(v.requires_grad for v in wrapped.state().values())


@pytest.mark.parametrize("name", NAMES)
def test_bad_shapes_and_masks_are_explained(name):
    streams, mask = batch(name)
    with pytest.raises(CorankError, match="mask has shape"):
        fresh(name).update(*streams, mask[:, :-1])
    with pytest.raises(CorankError, match="floating point"):
        fresh(name).update(*streams, mask.double())
    with pytest.raises(CorankError, match="dtype"):
        fresh(name).update(*(s.long() for s in streams), mask)
    if name != "angular":
        with pytest.raises(CorankError, match=r"got|expected"):
            fresh(name).update(*(s[..., :-1] for s in streams), mask)
    if len(streams) == 2:
        with pytest.raises(CorankError):
            fresh(name).update(streams[0], streams[1][:, :-1], mask)


def test_merging_what_does_not_belong_together_is_refused():
    with pytest.raises(CorankError, match="Cannot merge"):
        STATISTICS["gram"](3).merge(STATISTICS["gram"](4))
    with pytest.raises(CorankError, match="Cannot merge"):
        STATISTICS["gram"](3).merge(STATISTICS["moments"](3))


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_declared(name):
    assert STATISTICS[name].needs
    assert STATISTICS[name].needs <= {"inputs", "gradients", "drifted", "hidden"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NAMES)
def test_devices_agree_and_merge(name):
    streams, mask = batch(name, dtype=torch.float32)
    here, there, held = fresh(name), fresh(name), fresh(name, device="cpu")
    here.update(*streams, mask)
    there.update(*(s.cuda() for s in streams), mask.cuda())
    held.update(*(s.cuda() for s in streams), mask)
    assert all(v.device.type == "cpu" for v in held.state().values())
    assert_same(held, here, rtol=1e-6)
    assert_same(fresh(name, device="cpu").merge(there), here, rtol=1e-6)
