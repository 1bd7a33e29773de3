"""The link of layers that are compressed already: what trains keeps their kind and rank."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import disturb

from corank import adapters, checkpoint
from corank.adapters import attach
from corank.errors import CorankError
from corank.factors import CURLinear, FactorizedLinear
from factorized import KINDS, KINDS_AND_SHARED, compressed, logits, loss, mixed

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore:Initializing zero")]
EXACT = dict(rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS_AND_SHARED)
def test_the_link_trains_merges_and_is_saved(kind, tmp_path):
    make = lambda: compressed(kind, ranks=(5, 3, 4, 2), dtype=torch.float64)  # noqa: E731
    model = make()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FactorizedLinear) and m.rank}
    specs, bare = checkpoint.collect(model), logits(model)
    dense = [
        n
        for n, m in model.named_modules()
        if type(m) is torch.nn.Linear and n.split(".")[-1] in ("o_proj", "down_proj")
    ]
    model = attach(model, "curing", rank=4)
    assert adapters.trainable(model) == sum(m.rank**2 for m in layers.values()) + 16 * len(dense)
    assert torch.equal(logits(model), bare)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    begun = loss(model).item()
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < begun
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n in before if "corank_core" in n}
    disturb(model, 0.02)
    trained = logits(model)
    again = adapters.load(make(), adapters.save(model, tmp_path / "adapter"))
    assert torch.equal(logits(again), trained)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), trained, **EXACT)
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, **EXACT)
    assert checkpoint.collect(merged) == specs
    checkpoint.save(merged, None, tmp_path / "merged")
    torch.testing.assert_close(logits(checkpoint.load(tmp_path / "merged", tokenizer=False)[0]), trained, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_what_must_stay_stays(kind):
    """Rows and columns of a CUR, pivot rows and columns: they are those of the matrix after merging as before."""
    model = compressed(kind, dtype=torch.float64)
    fixed = {"cur": ("down", "up"), "row_pivoted": ("up",), "column_pivoted": ("down",), "low_rank": ("down",)}[kind]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    before = {(n, part): getattr(m, part).weight.detach().clone() for n, m in layers.items() for part in fixed}
    adapted = attach(model, "curing", rank=4)
    disturb(adapted)
    merged = adapted.merge_and_unload()
    for (name, part), weight in before.items():
        assert torch.equal(getattr(merged.get_submodule(name), part).weight, weight)


def test_the_link_of_a_cur_is_the_parameter_that_healing_trains():
    """One step of gradient descent on the adapter is one on the link itself."""
    model, plain = (compressed("cur", ranks=(5,), dtype=torch.float64) for _ in range(2))
    adapted = attach(model, "curing")
    links = [m.link.weight for m in plain.modules() if isinstance(m, CURLinear)]
    for p in plain.parameters():
        p.requires_grad_(any(p is link for link in links))
    for trained in (adapted, plain):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
        loss(trained).backward()
        optimizer.step()
    torch.testing.assert_close(logits(adapted.merge_and_unload()), logits(plain), **EXACT)


def test_all_kinds_in_one_model():
    model = mixed()
    adapted = attach(model, "curing", rank=4)
    disturb(adapted)
    trained = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), trained, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_adapted_says_so():
    for method in ("curlora", "tcurlora", "mora", "pissa"):
        with pytest.raises(CorankError, match="is factorized.*use the adapter curing"):
            attach(compressed("low_rank"), method, rank=2)
    with pytest.raises(CorankError, match="Nothing would train"):
        attach(compressed("cur", ranks=(0,)), "curing")
    with pytest.raises(CorankError, match="measured on dense models"):
        attach(mixed(), "curing", rank=4, data=[{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    adapted = attach(compressed("cur"), "curing")
    layer = next(m for m in adapted.modules() if hasattr(m, "corank_forms"))
    with pytest.raises(CorankError, match="has no weight"):
        layer.get_delta_weight("default")


def test_an_adapter_is_not_loaded_on_another_form_of_its_layers(tmp_path):
    """A core of the right size would fit, and mean something else."""
    small, dense = compressed("cur", ranks=(4,)), checkpoint.dequantize(compressed("cur", ranks=(4,)))
    links, ends = attach(small, "curing"), attach(dense, "curing", rank=4)
    assert adapters.trainable(links) == adapters.trainable(ends)
    adapters.save(links, tmp_path / "links")
    adapters.save(ends, tmp_path / "ends")
    with pytest.raises(CorankError, match="is dense, and the adapter is for a factorized layer"):
        adapters.load(checkpoint.dequantize(compressed("cur", ranks=(4,))), tmp_path / "links")
    with pytest.raises(CorankError, match="is factorized, and the adapter is for a dense layer"):
        adapters.load(compressed("cur", ranks=(4,)), tmp_path / "ends")


def test_quantized_factors_are_refused(tmp_path):
    pytest.importorskip("torchao")
    checkpoint.save(compressed("low_rank"), None, tmp_path / "small")
    checkpoint.quantize_factors(tmp_path / "small", "int8", out=tmp_path / "integers")
    model = checkpoint.load(tmp_path / "integers", tokenizer=False)[0]
    with pytest.raises(CorankError, match="is quantized; attach adapters first"):
        attach(model, "curing")
