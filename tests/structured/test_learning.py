"""Methods that learn which units go: what is masked, what is folded, what is merged and what is sliced is the same model."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from depth_cases import DATA, TEXT, four_blocks, logits, some_ids
from torch.nn import functional

import corank
from corank.errors import CorankError
from corank.gates import Gates, HardConcrete, Plain
from corank.model import ResidentModel, prompted
from corank.order import Order
from corank.structured.allocation import Part
from corank.structured.gated import HIDDEN, hidden_place
from corank.structured.gradual import GradualMasks, by_gates, by_lora, wanted
from corank.structured.l0 import Clamp, choose, fill, in_principal_components, largest, shift
from corank.structured.learning import Case, adapters, take_out, text_loss
from corank.structured.lora_gradient import product_gradient
from corank.structured.plan import make_plan
from corank.structured.units import CHANNELS
from corank.training.movement import share_kept
from tiny import saved, tiny, tokenizer, windows

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def case_of(model, method="compresso", keep=0.7, scope=None, work=None, **settings):
    order = Order.take(method, {"keep": keep}, scope, settings, TEXT, samples=6, length=16, seed=0, batch=4)
    task = order.task(ResidentModel(model), tokenizer(), next(model.parameters()).dtype)
    return Case.of(task, make_plan(task), work)


def gates_of(case, seed=0, spread=3.0, cut=False):
    """Hard concrete gates with random parameters."""
    places = [f.place for f in case.fields] + [hidden_place(case.source.model, case.source.outline)] * cut
    gates = Gates(places, HardConcrete(sharpness=0.8), dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for theta in gates.theta.values():
            theta.copy_(spread * torch.randn(theta.shape, generator=g, dtype=torch.float64))
    return gates


def masked(case, masks, hidden):
    """Logits of the model with the gates of masks, as it now is."""
    places = [f.place for f in case.fields] + [hidden_place(case.source.model, case.source.outline)] * (
        hidden is not None
    )
    gates = Gates(places, Plain(), dtype=torch.float64)
    with torch.no_grad():
        for name, theta in gates.theta.items():
            theta.copy_(hidden[1] if name == HIDDEN else masks.values[name])
    with gates.attached(case.source.model):
        return logits(case.source.model, some_ids())


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "qwen2-bias"])
def test_masked_with_adapters_is_sliced_with_everything_folded_and_merged(name, cut):
    model = tiny(name, dtype=torch.float64)
    case = case_of(model)
    with adapters(model, case.matrices(ROLES), 3, seed=1) as lora:
        assert len(lora.parameters) == 2 * 7 * 3 and lora.scale == 2.0
        with torch.no_grad():
            for path, p in lora.parameters.items():
                assert p.dtype == torch.float64
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(path)), dtype=p.dtype))
        masks, hidden = choose(case, gates_of(case, cut=cut))
        before = masked(case, masks, hidden)
    assert not any("lora" in n for n, _ in model.named_modules()) and not hasattr(model, "peft_config")
    torch.testing.assert_close(masked(case, masks, hidden), before, rtol=1e-9, atol=1e-9)  # merged
    learned = take_out(case, masks, hidden)
    scale = float(before.abs().max())  # norms compute in float32, those of fewer dimensions with another rounding
    assert torch.allclose(
        logits(model, some_ids()), before, rtol=0, atol=(1e-5 if cut else 1e-9) * scale
    )  # folded, sliced
    assert all(0 < float(v) <= 1.3 for values in masks.values.values() for v in values[values > 0])
    for layer, shape in enumerate(learned.plan.widths):
        block = model.model.layers[layer]
        assert block.mlp.down_proj.in_features == shape.channels == block.mlp.gate_proj.out_features
        assert block.self_attn.k_proj.out_features == shape.kv_heads * shape.head_dim
        assert block.self_attn.q_proj.out_features == shape.heads * shape.head_dim
    assert (learned.sliced is None) == (not cut)


def test_adapters_come_off_after_an_error_and_flags_are_restored():
    model = tiny("llama-gqa")
    before, state = logits(model, some_ids()), {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), adapters(model, ["model.layers.0.mlp.up_proj"], 2, seed=0) as lora:
        with torch.no_grad():
            next(iter(lora.parameters.values())).fill_(1.0)
        raise ZeroDivisionError
    assert torch.equal(logits(model, some_ids()), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert model.state_dict().keys() == state.keys()
    with adapters(model, [], 2, seed=0) as none:
        assert not none.parameters


@pytest.mark.parametrize("scope", ["sites", "model"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("keep", [0.6, 0.85])
def test_whatever_has_been_learned_the_budget_is_met(scope, cut, uniform, keep):
    model = tiny("llama-tied", dtype=torch.float64)
    dense = sum(p.numel() for p in model.parameters())
    case = case_of(model, keep=keep, scope=scope, uniform=uniform)
    blocks = case.source.outline.sites
    inside = sum(s.numel for s in blocks)
    masks, hidden = choose(case, gates_of(case, seed=3, cut=cut))
    take_out(case, masks, hidden)
    after = sum(model.get_submodule(s.name).weight.numel() for s in blocks)
    if scope == "sites":
        assert 0.5 * keep * inside < after <= keep * inside
    else:
        assert sum(p.numel() for p in model.parameters()) <= keep * dense
    widths = {(b.mlp.down_proj.in_features, b.self_attn.o_proj.in_features) for b in model.model.layers}
    assert len(widths) == 1 or not uniform


def test_the_expected_size_is_linear_in_chances_and_exact_at_certainty():
    case = case_of(tiny("llama-gqa"))
    sites = case.source.outline.sites
    ones = {f.units.name: torch.ones(f.units.count) for f in case.fields}
    assert float(case.sizes.total(ones)) == case.sizes.dense == sum(s.numel for s in sites)
    field = case.fields[1]
    ones[field.units.name][:5] = 0
    assert (
        case.sizes.dense - float(case.sizes.total(ones)) == 5 * 3 * 24
    )  # a channel is a row of gate, of up, a column of down
    assert float(case.sizes.total(ones, 0.5)) == 0.5 * float(case.sizes.total(ones))
    assert case.sizes.room(0.5) == 2 * case.sizes.limit - case.sizes.rest


def test_a_shift_is_the_inverse_of_a_size():
    assert shift(lambda t: 10 / (1 + math.exp(-t)), 5.0) == pytest.approx(0.0, abs=1e-6)
    assert shift(lambda t: 10 / (1 + math.exp(-t)), 11.0) == 60.0
    assert shift(lambda t: 10.0, 5.0) == pytest.approx(-60.0, abs=1e-6)
    assert largest(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2).tolist() == [1, 2]


def test_what_is_left_of_the_budget_goes_to_the_largest_gates():
    parts = [Part(0, "channels", 4, 3), Part(1, "channels", 5, 2, step=2)]
    thetas = [torch.tensor([0.0, 3.0, 2.0, 1.0]), torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])]
    assert fill(parts, thetas, [1, 2], 0) == [1, 2]
    assert fill(parts, thetas, [1, 2], 3) == [2, 2]  # a step of the second would take 4
    assert fill(parts, thetas, [1, 2], 9) == [2, 5]  # 4 and 2 for the second, which has the larger gates, then 3
    assert fill(parts, thetas, [4, 5], 100) == [4, 5]


def test_gates_that_learned_their_size_keep_it():
    """Gates that are open or closed for certain and add up to the budget: nothing else goes."""
    case = case_of(tiny("llama-gqa"), keep=0.7, allocate="uniform")
    gates = gates_of(case)
    counts = {f.units.name: wanted(case, f) for f in case.fields}
    with torch.no_grad():
        for name, theta in gates.theta.items():
            theta.fill_(-25.0)
            theta[-counts[name] :] = 25.0
    masks, _ = choose(case, gates)
    for f in case.fields:
        n, k = f.units.count, counts[f.units.name]
        assert masks.kept[f.units.name].tolist()[-k:] == list(range(n - k, n))
        assert torch.equal(masks.values[f.units.name][-k:], torch.ones(k, dtype=torch.float64))


def test_gates_are_clamped():
    theta = torch.nn.Parameter(torch.tensor([-9.0, 0.5, 9.0]))
    other = torch.nn.Parameter(torch.tensor([9.0]))
    assert not Clamp().after(0, {"gate.a": theta, "lora.b": other})
    assert theta.tolist() == pytest.approx([-math.log(100), 0.5, math.log(100)]) and other.tolist() == [9.0]


def loss_of(case, which=range(4)):
    return text_loss(case.source, case.data, which)


def test_masks_close_for_good_on_schedule_and_the_least_important_first():
    case = case_of(tiny("llama-gqa", dtype=torch.float64), "loraprune", keep=0.6)
    g = torch.Generator().manual_seed(0)
    masks = GradualMasks(
        case, 40, lambda f, values: torch.rand(f.units.count, generator=g, dtype=torch.float64), every=4
    )
    thetas = {f"gate.{f.units.name}": torch.nn.Parameter(torch.ones(f.units.count)) for f in case.fields}
    history = []
    for step in range(40):
        assert not masks.after(step, thetas)
        history.append({n: m.clone() for n, m in masks.masks.items()})
        for name, mask in masks.masks.items():
            assert torch.equal(thetas[f"gate.{name}"].detach(), mask.float())
    for f in case.fields:
        name, final = f.units.name, wanted(case, f)
        sizes = [int(h[name].sum()) for h in history]
        assert sizes[:3] == [f.units.count] * 3 and sizes[35:] == [final] * 5
        assert sizes[19] == round(f.units.count * share_kept(20, 40, final / f.units.count, 0.1, 0.1))
        assert all(
            bool((late <= early).all())
            for early, late in zip(history, history[1:], strict=False)
            for early, late in [(early[name], late[name])]
        )
    channel = case.fields[1].units
    one = GradualMasks(case, 10, lambda f, values: torch.arange(f.units.count).double())
    for step in range(10):
        one.after(step, thetas)
    kept = one.masks[channel.name].nonzero().flatten().tolist()
    assert kept == list(range(channel.count - len(kept), channel.count))


def test_gradual_masks_go_on_from_their_state():
    case = case_of(tiny("llama-gqa", dtype=torch.float64), "loraprune", keep=0.6)
    thetas = {f"gate.{f.units.name}": torch.nn.Parameter(torch.ones(f.units.count)) for f in case.fields}

    def importance_at(step):
        g = torch.Generator().manual_seed(step)
        return lambda f, values: torch.rand(f.units.count, generator=g, dtype=torch.float64)

    whole, first, second = (GradualMasks(case, 20, importance_at(0), every=2) for _ in range(3))
    for step in range(20):
        whole.importance = importance_at(step)
        whole.after(step, thetas)
        half = first if step < 10 else second
        if step == 10:
            second.restore(first.state())
        half.importance = importance_at(step)
        half.after(step, thetas)
    assert all(torch.equal(whole.masks[n], second.masks[n]) for n in whole.masks)
    assert all(torch.equal(whole.averaged[n], second.averaged[n]) for n in whole.averaged)


def test_steps_without_finite_gradients_do_not_count():
    case = case_of(tiny("llama-gqa"), "loraprune")
    thetas = {f"gate.{f.units.name}": torch.nn.Parameter(torch.ones(f.units.count)) for f in case.fields}
    masks = GradualMasks(case, 10, lambda f, values: torch.full((f.units.count,), torch.nan))
    masks.after(0, thetas)
    assert all(float(i.abs().sum()) == 0 for i in masks.averaged.values())


def test_the_gradient_of_a_gate_is_that_of_its_unit():
    """For a head: the sum over its columns and all tokens of z dloss/dz, from the graph."""
    case = case_of(tiny("llama-gqa", dtype=torch.float64), "loraprune")
    field = case.fields[0]
    assert field.units.size == 12
    seen = []

    def keep(_module, args):
        args[0].retain_grad()
        seen.append(args[0])

    module = case.source.model.get_submodule(field.units.name)
    handle = module.register_forward_pre_hook(keep)
    loss_of(case).backward()
    handle.remove()
    expected = (seen[0].detach() * seen[0].grad).sum((0, 1)).view(2, 12).sum(1).abs()
    gates = Gates([field.place], Plain(), dtype=torch.float64)
    with gates.attached(case.source.model):
        loss_of(case).backward()
    found = by_gates(field, {f"gate.{n}": p for n, p in gates.theta.items()})
    torch.testing.assert_close(found, expected / expected.norm(), rtol=1e-6, atol=1e-9)


def test_the_papers_importance_is_made_of_the_gradients_of_the_adapters():
    model = tiny("llama-gqa", dtype=torch.float64)
    case = case_of(model, "loraprune")
    field = case.fields[1]
    assert field.part.kind == CHANNELS
    W = {n: model.get_submodule(f"model.layers.0.mlp.{n}_proj").weight.detach().clone() for n in ("gate", "up", "down")}
    with adapters(model, case.matrices(ROLES), 2, 0) as lora:
        for p in lora.parameters.values():
            p.requires_grad_(True)
        loss_of(case).backward()
        found = by_lora(case, lora)(field, lora.parameters)
        expected = torch.zeros(37, dtype=torch.float64)
        for name, matrix in W.items():
            A, B = (lora.parameters[f"lora.model.layers.0.mlp.{name}_proj.{part}"] for part in "AB")
            assert float(B.detach().abs().max()) == 0 and float(A.grad.abs().max()) == 0
            G = product_gradient(A.detach(), B.detach(), A.grad, B.grad)
            assert torch.equal(G, B.grad @ A.detach())
            part = (G * matrix).abs().sum(0 if name == "down" else 1)
            expected += part / part.norm()
    torch.testing.assert_close(found, expected)


def test_units_that_say_nothing_go_first_and_nobody_notices():
    """17 of 37 channels are silent; with a rate at which adapters stay where they are, the output does too."""
    model = four_blocks()
    with torch.no_grad():
        for block in model.model.layers:
            for rows in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight.mT):
                rows[20:] = 0
    before = logits(model, some_ids())
    dense = 4 * (3 * 24 * 37 + 24 * 24 * 2 + 24 * 12 * 2)
    kept = 4 * (3 * 24 * 20 + 24 * 24 * 2 + 24 * 12 * 2)
    given = {"attention": False, "steps": 6, "rate": 1e-15}
    corank.compress(model, "loraprune", keep=kept / dense, tokenizer=tokenizer(), **given, **DATA)
    assert {block.mlp.up_proj.out_features for block in model.model.layers} == {20}
    torch.testing.assert_close(logits(model, some_ids()), before, rtol=0, atol=1e-8 * float(before.abs().max()))


@pytest.mark.parametrize("method", ["compresso", "sp3"])
def test_gates_begin_with_units_that_say_nothing_at_the_end(method):
    model = tiny("llama-gqa", dtype=torch.float64)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, 20:] = 0
    case = case_of(model, method, steps=8)
    gates = gates_of(case)
    case.task.recipe.learn.begin(case, gates, 3, None)
    for field in case.fields:
        theta = gates.theta[field.units.name].detach()
        assert 1.0 <= float(theta.min()) and float(theta.max()) <= math.log(100) + 1e-9
        if field.part.kind == CHANNELS:
            assert float(theta[20:].max()) < min(float(t.min()) for t in (theta[:20],))
    best = max(float(t.detach().max()) for t in gates.theta.values())
    assert best == pytest.approx(math.log(100))
    masks, _ = choose(case, gates)
    live = [f for f in case.fields if f.part.kind == CHANNELS]
    assert all(
        set(masks.kept[f.units.name].tolist()) <= set(range(20)) or len(masks.kept[f.units.name]) > 20 for f in live
    )


def test_principal_components_are_another_basis_of_the_same_model():
    model = tiny("llama-tied", dtype=torch.float64)
    before = logits(model, some_ids())
    case = case_of(model, "sp3", scope="model")
    turned = in_principal_components(case)
    scale = float(before.abs().max())
    assert torch.allclose(logits(model, some_ids()), before, rtol=0, atol=1e-5 * scale)
    assert turned.sizes.outside == case.sizes.outside + 64 * 24  # the head has become a matrix of its own
    masks, hidden = choose(turned, gates_of(turned, cut=True))
    wanted_logits = masked(turned, masks, hidden)
    take_out(turned, masks, hidden)
    assert torch.allclose(logits(model, some_ids()), wanted_logits, rtol=0, atol=1e-5 * scale)


def test_a_prompt_is_read_but_not_learned_and_the_report_says_so(tmp_path):
    data = prompted(tokenizer(), windows(3, 8), "BE SMALL ")
    assert data.ids.shape == (3, 17) and data.source["prompt_tokens"] == 9 and data.source["prompt"] == "BE SMALL "
    assert torch.equal(data.ids[:, 9:], windows(3, 8).ids)
    assert prompted(tokenizer(), windows(3, 8), "").ids.shape == (3, 8)
    model = tiny("llama-gqa", dtype=torch.float64)
    found = text_loss(ResidentModel(model), data, [0, 2], 9)
    out = logits(model, data.ids[[0, 2]])[:, 8:-1].float()
    aims = data.ids[[0, 2], 9:]
    torch.testing.assert_close(found.float(), functional.cross_entropy(out.flatten(0, 1), aims.flatten()))
    report = corank.compress(
        model, "compresso", keep=0.8, tokenizer=tokenizer(), steps=2, prompt="BE SMALL ", rank=0, **DATA
    )
    assert report.data["prompt"] == "BE SMALL " and any("prompt" in w for w in report.warnings)


def test_an_interrupted_training_goes_on_where_it_was(tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    given = dict(keep=0.7, steps=8, **DATA)
    for name in ("loraprune", "compresso"):
        corank.compress(folder, name, out=tmp_path / f"{name}-whole", **given)
        calls = 0

        def interrupt(layer, stage, error):
            nonlocal calls
            calls += stage == "train"
            if calls == 6:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            corank.compress(folder, name, out=tmp_path / name, progress=interrupt, **given)
        assert (tmp_path / f"{name}.partial" / "gates.pt").is_file() and not (tmp_path / name).exists()
        corank.compress(folder, name, out=tmp_path / name, **given)
        assert not (tmp_path / f"{name}.partial").exists()
        whole, again = (corank.load(tmp_path / f)[0] for f in (f"{name}-whole", name))
        for (n, a), (m, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
            assert n == m and torch.equal(a, b)


def test_a_directory_in_bfloat16_is_trained_in_float32_and_stays_bfloat16(tmp_path):
    folder = saved("llama-tied", tmp_path / "dense", dtype=torch.bfloat16)
    report = corank.compress(folder, "compresso", keep=0.7, out=tmp_path / "small", steps=4, **DATA)
    model, _ = corank.load(tmp_path / "small")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.accounting["bytes"]["compressed"] < 1.2 * 2 * report.accounting["model"]["compressed"] + 9000
    assert bool(torch.isfinite(logits(model, some_ids())).all())


def test_bad_input_is_told_before_anything_changes():
    model = tiny("llama-gqa")
    before = logits(model, some_ids())
    wrong = [
        ({"compensate": "ls"}, "trains all blocks"),
        ({"steps": 1}, "steps"),
        ({"minutes": -1.0}, "minutes"),
        ({"score": "wanda"}, "learned"),
    ]
    for settings, words in wrong:
        for method in ("compresso", "loraprune", "sp3"):
            with pytest.raises(CorankError, match=words):
                corank.compress(model, method, keep=0.8, tokenizer=tokenizer(), **settings, **DATA)
    with pytest.raises(CorankError, match="importance"):
        corank.compress(model, "loraprune", keep=0.8, tokenizer=tokenizer(), importance="luck", **DATA)
    with pytest.raises(CorankError, match="prior"):
        corank.compress(model, "sp3", keep=0.8, tokenizer=tokenizer(), prior="luck", **DATA)
    with pytest.raises(CorankError, match="belongs to methods that train"):
        corank.compress(model, "flap", keep=0.8, tokenizer=tokenizer(), score="learned", **DATA)
    examples = [{"input_ids": some_ids()}]
    with pytest.raises(CorankError, match="text"):
        corank.compress(model, "loraprune", keep=0.8, data=examples)
    assert torch.equal(logits(model, some_ids()), before)
