"""The gate engine against exact oracles: hooks, relaxations, scores, multipliers, the loop."""

from __future__ import annotations

import math

import pytest
import torch

from corank.errors import CorankError
from corank.gates import (
    Directions,
    Gates,
    HardConcrete,
    Lagrangian,
    Plain,
    Point,
    Recorder,
    ScoreMap,
    StraightThrough,
    Vector,
    language_loss,
    steps,
    train,
)
from corank.gates.gate import Adapter
from corank.gates.relax import straight_through
from corank.gates.shrinking import Shrinking
from corank.model import ResidentModel
from tiny import tiny, windows

DOWN = "model.layers.1.mlp.down_proj"
OUT = "model.layers.0.self_attn.o_proj"


def model():
    return tiny("llama-gqa", dtype=torch.float64)


def logits(m):
    with torch.no_grad():
        return m(input_ids=windows().ids).logits


def directions(m, path, adapter=None):
    U, s, Vh = torch.linalg.svd(m.get_submodule(path).weight.detach(), full_matrices=False)
    return Directions(path, path, U, s[:, None] * Vh, adapter)


def places(m):
    return [
        directions(m, "model.layers.0.mlp.up_proj"),
        directions(m, "model.layers.2.self_attn.q_proj"),
        Vector(DOWN, (Point(DOWN),), count=37, each=3 * 24),
        Vector(OUT, (Point(OUT),), count=2, size=12, each=100),
        Vector("hidden", tuple(Point(f"model.layers.{i}.mlp", "output") for i in range(3)), count=24),
        Vector("attention", (Point("model.layers.1.self_attn", "output"),), count=24),
    ]


def made(m, relax=None):
    return Gates(places(m), relax or StraightThrough(), dtype=torch.float64)


@pytest.mark.parametrize("relax", [StraightThrough(), HardConcrete(start=10.0), Plain()])
def test_untouched_gates_are_the_model_and_leave_no_trace(relax):
    m = model()
    before, state = logits(m), {k: v.clone() for k, v in m.state_dict().items()}
    attributes = {n: sorted(x.__dict__) for n, x in m.named_modules()}
    hooks = sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())
    with made(m, relax).attached(m):
        torch.testing.assert_close(logits(m), before, rtol=1e-10, atol=1e-10)
    assert torch.equal(logits(m), before)
    assert {n: sorted(x.__dict__) for n, x in m.named_modules()} == attributes
    assert sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules()) == hooks
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())


def test_hooks_come_off_after_an_error():
    m = model()
    before = logits(m)
    gates = Gates([Vector("wrong", (Point(DOWN),), count=36)], Plain())
    with pytest.raises(CorankError, match="are for vectors of 36 values"), gates.attached(m):
        logits(m)
    assert torch.equal(logits(m), before)
    with pytest.raises(CorankError, match="same name"):
        Gates([Vector("a", (), 1), Vector("a", (), 2)], Plain())
    with pytest.raises(CorankError, match="input or output"):
        Point(DOWN, "outside")


def test_a_closed_gate_is_a_unit_that_is_gone():
    """Against the same model with the columns and rows of these units set to zero by hand."""
    m, other = model(), model()
    gates = made(m)
    g = torch.Generator().manual_seed(3)
    masks = {n: (torch.rand(len(p), generator=g) > 0.4).double() for n, p in gates.theta.items()}
    with torch.no_grad():
        for n, p in gates.theta.items():
            p.copy_(2 * masks[n] - 1)
        for name in ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"):
            place = gates.places[name]
            other.get_submodule(name).weight.copy_(place.up @ (masks[name][:, None] * place.down))
        other.get_submodule(DOWN).weight.mul_(masks[DOWN])
        other.get_submodule(OUT).weight.mul_(masks[OUT].repeat_interleave(12))
        for i in range(3):
            other.model.layers[i].mlp.down_proj.weight.mul_(masks["hidden"][:, None])
        other.model.layers[1].self_attn.o_proj.weight.mul_(masks["attention"][:, None])
    with gates.attached(m):
        torch.testing.assert_close(logits(m), logits(other), rtol=1e-10, atol=1e-10)
    assert gates.size() == sum(p.cost(int(masks[n].sum())) for n, p in gates.places.items())


def test_directions_work_on_conv1d_layers_and_with_biases():
    m = tiny("gpt2-conv1d", dtype=torch.float64)
    path = "transformer.h.1.mlp.c_fc"
    U, s, Vh = torch.linalg.svd(m.get_submodule(path).weight.detach().T, full_matrices=False)
    gates = Gates([Directions(path, path, U, s[:, None] * Vh)], StraightThrough(), dtype=torch.float64)
    before = logits(m)
    with gates.attached(m):
        torch.testing.assert_close(logits(m), before, rtol=1e-10, atol=1e-10)


def test_the_straight_through_gradient_is_that_of_relu():
    theta = torch.tensor([-1.0, -1e-9, 0.0, 1e-9, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    w = torch.arange(1.0, 7.0, dtype=torch.float64)
    z = straight_through(theta)
    assert z.tolist() == [0, 0, 0, 1, 1, 1]
    (found,) = torch.autograd.grad((w * z).sum(), theta)
    (expected,) = torch.autograd.grad((w * torch.relu(theta)).sum(), theta)
    assert torch.equal(found, expected)


def test_the_gradient_of_a_plain_gate_is_the_sum_over_tokens_of_z_dz():
    m, data = model(), windows()
    seen = []

    def keep(_module, args):
        args[0].retain_grad()
        seen.append(args[0])

    place = Vector(DOWN, (Point(DOWN),), count=37)
    source = ResidentModel(m)
    handle = m.get_submodule(DOWN).register_forward_pre_hook(keep)
    language_loss(source, data, range(6)).backward()
    handle.remove()
    expected = (seen[0].detach() * seen[0].grad).sum((0, 1))
    gates = Gates([place], Plain(), dtype=torch.float64)
    with gates.attached(m):
        language_loss(source, data, range(6)).backward()
    torch.testing.assert_close(gates.theta[DOWN].grad, expected, rtol=1e-9, atol=1e-12)


def test_the_language_loss_is_that_of_transformers():
    m, data = model(), windows(padded=True)
    ids = data.ids.masked_fill(~data.mask, -100)
    with torch.no_grad():
        expected = m(input_ids=data.ids, attention_mask=data.mask.long(), labels=ids).loss
        found = language_loss(ResidentModel(m), data, list(range(len(data.ids))))
    torch.testing.assert_close(found, expected.to(found), rtol=1e-6, atol=1e-6)  # theirs is in float32


def test_the_chance_of_a_hard_concrete_gate_is_its_closed_form():
    relax, n = HardConcrete(), 400_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for a in (-3.0, -1.0, 0.0, 0.7, 2.5):
        theta = torch.full((n,), a, dtype=torch.float64)
        z = relax.draw(theta, u)
        p = float(relax.alive(theta[:1]))
        assert p == pytest.approx(1 - 1 / (1 + math.exp(-(2 / 3 * math.log(0.1 / 1.1) - a))), rel=1e-12)
        assert float((z > 0).double().mean()) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n) + 1e-12)
        assert float(z.min()) >= 0 and float(z.max()) <= 1
    for a, expected in ((10.0, 1.0), (-10.0, 0.0)):
        assert float(relax.value(torch.tensor([a]))) == expected
        assert float(relax.draw(torch.tensor([a]), torch.tensor([0.5]))) == expected
    assert float(HardConcrete.with_chance(0.01).initial(1)) == pytest.approx(math.log(99))


def test_noise_depends_on_seed_and_step_alone():
    gates = Gates([Vector("a", (), 5), Vector("b", (), 3)], HardConcrete(start=0.0))
    gates.draw(1, 2)
    first = {n: gates.value(n).tolist() for n in gates.theta}
    gates.draw(1, 3)
    assert gates.value("a").tolist() != first["a"]
    gates.draw(1, 2)
    assert {n: gates.value(n).tolist() for n in gates.theta} == first
    with gates.quiet():
        assert gates.value("a").tolist() == HardConcrete().value(torch.zeros(5)).tolist()


def test_the_multipliers_ask_for_more_as_long_as_too_little_is_gone():
    for s, sign in ((0.1, -1.0), (0.5, 1.0)):
        lagrangian = Lagrangian(0.3)
        sparsity = torch.tensor(s, requires_grad=True)
        lagrangian(sparsity, 0).backward()
        assert torch.sign(lagrangian.multipliers.grad[0]) == sign  # ascent lowers l1 while s < t
        with torch.no_grad():
            lagrangian.multipliers += 0.1 * lagrangian.multipliers.grad
        sparsity.grad = None
        lagrangian(sparsity, 0).backward()
        assert torch.sign(sparsity.grad) == sign  # and descent then raises s while s < t
    warm = Lagrangian(0.4, warm=4)
    assert [warm.goal(step) for step in (0, 1, 3, 9)] == pytest.approx([0.1, 0.2, 0.4, 0.4])
    at = torch.tensor(0.2)
    assert float(warm(at, 1).detach()) == 0.0


# --- scores


def test_scores_follow_the_rule():
    gates = Gates([Vector("a", (), 4)], StraightThrough())
    recorder = Recorder(gates)
    for step, theta in enumerate(([0.9, 0.5, 0.2, 0.1], [0.8, -0.1, 0.2, 0.0], [0.7, -0.2, -0.3, 0.0])):
        with torch.no_grad():
            gates.theta["a"].copy_(torch.tensor(theta))
        assert recorder.after(step, {"gate.a": gates.theta["a"]}) is False
    found = recorder.scores().scores["a"]
    assert found.tolist() == pytest.approx([0.7, -1.0, 0.0, -1.0])
    other = Recorder(gates)
    other.restore(recorder.state())
    assert torch.equal(other.scores().scores["a"], found)


def test_kept_sets_are_nested_and_sizes_monotone():
    g = torch.Generator().manual_seed(0)
    m = model()
    gates = made(m)
    scores = ScoreMap({n: torch.randn(len(p), generator=g).double().round(decimals=1) for n, p in gates.theta.items()})
    before, sizes = None, []
    for limit in torch.linspace(400, gates.dense, 40).long().tolist():
        kept = scores.kept(gates.places, limit, least=1)
        size = sum(gates.places[n].cost(len(k)) for n, k in kept.items())
        assert size <= limit
        assert all(len(k) >= 1 for k in kept.values())
        if before is not None:
            assert all(set(before[n].tolist()) <= set(k.tolist()) for n, k in kept.items())
        before = kept
        sizes.append(size)
    assert sizes == sorted(sizes) and sizes[-1] == gates.dense
    assert all(len(k) == gates.places[n].count for n, k in before.items())
    with pytest.raises(CorankError, match="have to stay"):
        scores.kept(gates.places, 10, least=1)


def test_what_is_kept_is_what_scores_highest():
    """One more unit than fits does not fit; and no unit that goes has a higher score than one that stays."""
    scores = ScoreMap({"a": torch.tensor([3.0, 1.0, -2.0]), "b": torch.tensor([2.0, -1.0])})
    where = {"a": Vector("a", (), 3, each=10), "b": Vector("b", (), 2, each=7)}
    assert [(n, i) for n, i in scores.order()] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    kept = scores.kept(where, 26)
    assert {n: k.tolist() for n, k in kept.items()} == {"a": [0], "b": [0]}
    kept = scores.kept(where, 27)
    assert {n: k.tolist() for n, k in kept.items()} == {"a": [0, 1], "b": [0]}


def test_scores_survive_a_file(tmp_path):
    scores = ScoreMap({"a": torch.tensor([3.0, -1.0], dtype=torch.float64)})
    scores.save(tmp_path / "x.safetensors", about={"kind": "low_rank"}, **{"up/a": torch.eye(2)})
    found, beside, about = ScoreMap.load(tmp_path / "x.safetensors")
    assert about == {"kind": "low_rank"}
    assert torch.equal(found.scores["a"], scores.scores["a"]) and torch.equal(beside["up/a"], torch.eye(2))
    (tmp_path / "y.safetensors").write_bytes(b"no")
    with pytest.raises(CorankError, match="cannot be read"):
        ScoreMap.load(tmp_path / "y.safetensors")
    with pytest.raises(CorankError, match="not finite"):
        ScoreMap({"a": torch.tensor([float("nan")])})


# --- the loop


def trained(tmp=None, count=12, fail=None, relax=None, seed=0, adapter=False, **settings):
    """A short training of gates on two places; (model, gates, recorder, history, adapter)."""
    m = model()
    beside = None
    if adapter:
        g = torch.Generator().manual_seed(5)
        beside = Adapter(
            torch.nn.Parameter(torch.randn(2, 37, generator=g, dtype=torch.float64)),
            torch.nn.Parameter(torch.zeros(24, 2, dtype=torch.float64)),
            0.5,
        )
    up = directions(m, DOWN, beside)
    relax = relax or StraightThrough()
    gates = Gates([up, Vector(OUT, (Point(OUT),), count=2, size=12, each=100)], relax, dtype=torch.float64)
    recorder, source, data = Recorder(gates), ResidentModel(m), windows(samples=8)
    made = {"learning_rate": 0.08, "batch": 2, "seed": seed, **settings}

    class Watch:
        def before(self, step):
            if step == fail:
                raise KeyboardInterrupt

        def after(self, step, values):
            return False

        def state(self):
            return {}

        def restore(self, state):
            pass

    def penalty(step):
        return 0.02 * 1.05**step * sum(torch.relu(p).sum() for p in gates.theta.values())

    with gates.attached(m):
        history = train(
            source,
            gates,
            data,
            steps(count, 8, **made),
            penalty=penalty,
            beside={} if beside is None else {"lora.C": beside.C, "lora.D": beside.D},
            rates={"lora": 0.01},
            companions=[recorder, Watch()],
            state=tmp,
        )
    return m, gates, recorder, history, beside


def test_only_what_is_declared_changes_and_the_same_seed_gives_the_same():
    m, gates, recorder, history, beside = trained(adapter=True)
    fresh = model().state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in m.state_dict().items())
    assert all(not torch.equal(p, torch.ones_like(p)) for p in gates.theta.values())
    assert bool(beside.D.any())
    assert any(p.requires_grad for p in m.parameters())  # as it was
    again = trained(adapter=True)
    assert all(torch.equal(p, again[1].theta[n]) for n, p in gates.theta.items())
    assert history.heldout == again[3].heldout
    other = trained(adapter=True, seed=1)
    assert not torch.equal(other[1].theta[DOWN], gates.theta[DOWN])


def test_some_gates_close_and_the_last_state_is_the_result():
    _, gates, recorder, history, _ = trained(count=24)
    is_open = gates.open()[DOWN]
    assert 0 < int(is_open.sum()) < 24
    scores = recorder.scores().scores[DOWN]
    assert bool((scores[is_open] > 0).all()) and bool((scores[~is_open] <= 0).all())
    assert gates.ratio() < 1.0
    assert history.best == history.heldout[-1]  # not the best one, which was before any gate closed


@pytest.mark.parametrize("relax", [StraightThrough(), HardConcrete(start=2.0)])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, relax):
    whole = trained(relax=relax)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "state.pt", fail=9, relax=relax)
    resumed = trained(tmp_path / "state.pt", relax=relax)
    for n, p in whole[1].theta.items():
        assert torch.equal(p, resumed[1].theta[n])
    assert torch.equal(whole[2].closed[DOWN], resumed[2].closed[DOWN])
    assert whole[3].heldout == resumed[3].heldout


def test_a_companion_ends_the_training_and_it_stays_ended(tmp_path):
    class End(Recorder):
        def after(self, step, values):
            super().after(step, values)
            return step == 4

    def run():
        m = model()
        gates = Gates([directions(m, DOWN)], StraightThrough(), dtype=torch.float64)
        with gates.attached(m):
            history = train(
                ResidentModel(m), gates, windows(), steps(12, 6), companions=[End(gates)], state=tmp_path / "s.pt"
            )
        return history, gates

    first, again = run(), run()
    assert first[0].steps[-1] == 5 == again[0].steps[-1]
    assert torch.equal(first[1].theta[DOWN], again[1].theta[DOWN])


def test_a_loss_that_is_not_finite_ends_it_with_the_gates_before_it():
    m = model()
    gates = Gates([directions(m, DOWN)], StraightThrough(), dtype=torch.float64)
    seen = []

    class Look(Recorder):
        def after(self, step, values):
            seen.append(values[f"gate.{DOWN}"].detach().clone())
            return super().after(step, values)

    def penalty(step):
        return gates.theta[DOWN].sum() * (float("nan") if step == 3 else 0.01)

    with gates.attached(m):
        history = train(
            ResidentModel(m),
            gates,
            windows(),
            steps(8, 6, learning_rate=0.1),
            penalty=penalty,
            companions=[Look(gates)],
        )
    assert "not finite at step 4" in history.ended and len(seen) == 3
    assert torch.equal(gates.theta[DOWN].detach(), seen[-1])


def test_a_negative_rate_ascends():
    m = model()
    gates = Gates([directions(m, DOWN)], HardConcrete(start=1.0), dtype=torch.float64)
    lagrangian = Lagrangian(0.9)

    def penalty(step):
        alive = torch.cat(list(gates.alive().values()))
        return lagrangian(1 - alive.mean(), step)

    with gates.attached(m):
        train(
            ResidentModel(m),
            gates,
            windows(),
            steps(10, 6, learning_rate=0.05),
            penalty=penalty,
            beside=lagrangian.parameters(),
            rates={"lagrangian": -1.0},
        )
    assert float(lagrangian.multipliers[0]) < -0.1  # far from the target all along
    assert float(lagrangian.multipliers[1]) > 0.1


def test_the_penalty_sets_its_pace_by_what_is_open():
    """Its weight rises while more is open than the step asks for; and the end is told by what would be stored."""
    place = Vector("a", (), 10, each=5)
    up = torch.eye(6, dtype=torch.float64)
    matrix = Directions("m", "m", up, up.clone())  # 36 values, 12 a component: smaller from two components on
    gates = Gates([place, matrix], StraightThrough(), dtype=torch.float64)
    shrinking = Shrinking(gates, 0.5, steps=10)
    assert float(shrinking(0).detach()) == pytest.approx(shrinking.weight * 16)  # weighed by cost, of mean 1

    def after(step, a, m):
        with torch.no_grad():
            gates.theta["a"].copy_(torch.where(torch.arange(10) < a, 1.0, -1.0))
            gates.theta["m"].copy_(torch.where(torch.arange(6) < m, 1.0, -1.0))
        return shrinking.after(step, {f"gate.{n}": p for n, p in gates.theta.items()})

    start = shrinking.weight
    assert after(0, 10, 6) is False and shrinking.weight > start  # nothing has closed
    assert after(1, 5, 3) is False and shrinking.weight == pytest.approx(start)  # further than planned
    assert after(2, 4, 2) is False  # 20 + 24 > 43
    assert after(3, 3, 2) is True  # 15 + 24
    other = Shrinking(gates, 0.5, steps=10)
    other.restore(shrinking.state())
    assert other.weight == shrinking.weight
