"""Methods that take whole blocks away, against exact oracles."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from depth_cases import DATA, case_of, four_blocks, logits, some_ids

import corank
from corank.methods.structured.mka import share
from corank.statistics.angular import angle
from corank.structured.depth import turned
from corank.structured.manifold import diffusion_map, entropy, mutual_information, similarities, uniform_ranks
from tiny import tokenizer

DEPTH = ["shortgpt", "angular", "sleb", "mka"]


def without(model, removed):
    """The same model run without some of its blocks."""
    blocks = model.model.layers
    model.model.layers = torch.nn.ModuleList(b for i, b in enumerate(blocks) if i not in removed)
    model.config.num_hidden_layers = len(model.model.layers)
    return model, blocks


def loss_without(model, removed, windows):
    model, blocks = without(model, removed)
    with torch.no_grad():
        out = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    model.model.layers, model.config.num_hidden_layers = blocks, len(blocks)
    return float(F.cross_entropy(out, windows[:, 1:].flatten()))


@pytest.mark.parametrize("method", ["shortgpt", "sleb", "angular"])
def test_planted_identity_blocks_go_first_and_nothing_changes(method):
    planted = (1, 2) if method == "angular" else (1, 3)
    model = four_blocks(identity=planted)
    before = logits(model, some_ids())
    report = corank.compress(model, method, keep=0.5, tokenizer=tokenizer(), **DATA)
    assert sorted(report.extra["structure"]["removed"]) == list(planted)
    torch.testing.assert_close(logits(model, some_ids()), before, rtol=1e-12, atol=1e-12)
    assert [b.self_attn.layer_idx for b in model.model.layers] == [0, 1] == list(range(model.config.num_hidden_layers))


@pytest.mark.parametrize("method", DEPTH)
def test_keeping_everything_is_the_identity(method):
    model = four_blocks()
    before = logits(model, some_ids())
    report = corank.compress(model, method, keep=1, tokenizer=tokenizer(), **DATA)
    assert torch.equal(logits(model, some_ids()), before)
    assert report.extra["structure"]["removed"] == [] and report.kept("model") == 1
    assert any("stayed as it was" in w for w in report.warnings)


def test_the_influence_of_a_block_is_what_its_hooks_see():
    model = four_blocks()
    case, _ = case_of(model, "shortgpt", 0.5)
    states = []
    hooks = [b.register_forward_hook(lambda _m, a, out: states.append((a[0], out))) for b in model.model.layers]
    with torch.no_grad():
        model(input_ids=case.task.data.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for change, (x, y) in zip(case.walk.changes, states, strict=True):
        expected = 1 - F.cosine_similarity(x[:, 1:], y[:, 1:], dim=-1).mean()
        assert change == pytest.approx(float(expected), rel=1e-9)
    for boundary, (x, _) in enumerate(states):
        torch.testing.assert_close(case.walk.ends[boundary], x[:, -1])
        torch.testing.assert_close(case.walk.means[boundary], x.mean(1))


def test_turned_of_zero_and_extreme_vectors():
    huge = torch.tensor([[1e300, 0.0], [1e-300, 1e-300]], dtype=torch.float64)
    assert turned(huge, huge).tolist() == pytest.approx([0, 0], abs=1e-15)
    zero = torch.zeros(1, 3)
    assert turned(zero, zero).tolist() == [0] and turned(zero, torch.ones(1, 3)).tolist() == [1]
    assert turned(torch.tensor([[1.0, 0]]), torch.tensor([[-1.0, 0]])).tolist() == [2]


def test_angular_takes_the_span_whose_ends_are_nearest():
    case, recipe = case_of(four_blocks(), "angular", 0.5)
    span = recipe.depth(case).removed
    ends = case.walk.ends
    distances = {l: float(angle(ends[l], ends[l + 2]).mean()) for l in range(3)}
    assert span == (min(distances, key=distances.get), min(distances, key=distances.get) + 1)
    one, recipe = case_of(four_blocks(), "angular", 0.75)
    assert len(recipe.depth(one).removed) == 1


def test_sleb_is_the_brute_force_greedy_choice():
    model = four_blocks(seed=3)
    case, recipe = case_of(model, "sleb", 0.5)
    windows, removed = case.task.data.ids, []
    for _ in range(2):
        losses = {i: loss_without(model, [*removed, i], windows) for i in range(4) if i not in removed}
        assert case.losses_without(removed) == pytest.approx(losses, rel=1e-6)  # logits are float32 in the loss
        removed.append(min(losses, key=losses.get))
    assert recipe.depth(case).removed == tuple(removed)


def test_losses_leave_padding_out():
    model = four_blocks()
    case, _ = case_of(model, "sleb", 0.5)
    ids = case.task.data.ids
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 9:] = False
    padded, short = ids.clone(), ids[:1, :9]
    padded[0, 9:] = 5
    object.__setattr__(case.task.data, "ids", padded)
    object.__setattr__(case.task.data, "mask", mask)
    found = case.losses_without(())
    for i in range(4):
        total = loss_without(model, [i], short) * 8 + loss_without(model, [i], ids[1:]) * 15 * (len(ids) - 1)
        assert found[i] == pytest.approx(total / (8 + 15 * (len(ids) - 1)), rel=1e-6)


def test_protected_blocks_stay():
    for method, protect in itertools.product(("shortgpt", "sleb", "angular", "mka"), ("ends", "0,3", "-1,0")):
        model = four_blocks(identity=(0, 3))
        keep = 0.75 if method == "mka" else 0.5  # only two neighbours are left to merge
        report = corank.compress(model, method, keep=keep, tokenizer=tokenizer(), protect=protect, **DATA)
        structure = report.extra["structure"]
        assert {0, 3} <= set(structure["kept"]) and not {"0", "3"} & set(structure["merged"])


def test_mka_weights_and_similarities():
    g = torch.Generator().manual_seed(0)
    states = [torch.randn(40, 7, generator=g, dtype=torch.float64)]
    states += [states[0] + 1e-3 * torch.randn(40, 7, generator=g, dtype=torch.float64)]
    states += [torch.randn(40, 7, generator=g, dtype=torch.float64)]
    S = similarities(states)
    assert torch.equal(S, S.T) and bool(torch.isfinite(S).all())
    assert S[0, 1] > 2 * max(S[0, 2], S[1, 2])
    for a, b, beta in itertools.product((0.1, 3.0), (0.2, 5.0), (0.5, 1.0, 2.0)):
        assert share(a, b, beta) == pytest.approx(float(torch.sigmoid(torch.tensor(beta * a / (a + b)))), rel=1e-6)
        assert 0.5 <= share(a, b, beta) < 1


def test_the_estimates_of_information_are_right_where_it_is_known():
    g = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(600, generator=g, dtype=torch.float64) for _ in range(2))
    rho = 0.8
    found = mutual_information(x, rho * x + math.sqrt(1 - rho**2) * noise)
    assert found == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.1)
    assert mutual_information(x, noise) < 0.1
    y = torch.rand(400, 2, generator=g, dtype=torch.float64)
    assert entropy(2 * y) - entropy(y) == pytest.approx(2 * math.log(2), rel=1e-9)
    ranked = uniform_ranks(y)
    assert sorted(ranked[:, 0].tolist()) == pytest.approx([i / 400 for i in range(400)])
    assert diffusion_map(y).shape == (400, 2)


def test_mka_merges_the_matrices_of_neighbours():
    model = four_blocks()
    dense = four_blocks()
    report = corank.compress(model, "mka", keep=0.5, tokenizer=tokenizer(), **DATA)
    structure = report.extra["structure"]
    assert structure["merged"] and all(sum(mix.values()) == pytest.approx(1) for mix in structure["merged"].values())
    for new, old in enumerate(structure["kept"]):
        mix = structure["merged"].get(str(old), {str(old): 1.0})
        for name in ("self_attn.k_proj", "mlp.down_proj"):
            expected = sum(w * dense.get_submodule(f"model.layers.{i}.{name}").weight for i, w in mix.items())
            torch.testing.assert_close(model.get_submodule(f"model.layers.{new}.{name}").weight, expected)
        norm = dense.model.layers[old].input_layernorm.weight
        assert torch.equal(model.model.layers[new].input_layernorm.weight, norm)


def test_merging_a_block_with_its_copy_changes_no_weight():
    model = four_blocks(layers=2)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    before = {k: v.clone() for k, v in model.model.layers[0].state_dict().items()}
    corank.compress(model, "mka", keep=0.5, tokenizer=tokenizer(), **DATA)
    assert len(model.model.layers) == 1
    torch.testing.assert_close(model.model.layers[0].state_dict(), before)


@pytest.mark.parametrize("method", DEPTH)
def test_the_budget_is_met_in_every_way_of_saying_it(method):
    for budget in ({"keep": 0.8}, {"remove": "55%"}, {"keep": 0.5, "scope": "model"}, {"params": 9000}):
        model = four_blocks()
        dense = sum(p.numel() for p in model.parameters())
        report = corank.compress(model, method, tokenizer=tokenizer(), **budget, **DATA)
        scope = "model" if "params" in budget or budget.get("scope") == "model" else "sites"
        after = report.accounting[scope]["compressed"]
        limit = budget.get("params") or (budget.get("keep") or 0.45) * report.accounting[scope]["dense"]
        assert after <= limit
        assert report.accounting["model"] == {"dense": dense, "compressed": sum(p.numel() for p in model.parameters())}


def test_impossible_requests_are_told_before_anything_happens():
    def fails(match, method="shortgpt", model=None, **given):
        model = model or four_blocks()
        before = len(model.model.layers)
        with pytest.raises(corank.CorankError, match=match):
            corank.compress(model, method, tokenizer=tokenizer(), **{"keep": 0.5, **given}, **DATA)
        assert len(model.model.layers) == before

    fails("leaves less than a single block, which is 25.0% of the sites; give at least keep=0.25", keep=0.2)
    fails("leaves less than the protected blocks", keep=0.3, protect="ends")
    fails("more blocks than this method can take away", "angular", protect="1", keep=0.3)
    fails("the model has the blocks 0 to 3", protect="7")
    fails("give numbers of blocks", protect="last")
    fails("no widths", compensate="ls")
    fails("no widths", multiple_of=8)
    fails("protect", protct="ends")
    fails("Give exactly one", keep=None)
    with pytest.raises(corank.CorankError, match="no setting|setting of 'shortgpt'"):
        corank.compress(four_blocks(), "shortgpt", keep=0.5, targets="q", tokenizer=tokenizer(), **DATA)


def test_activations_that_are_not_finite_name_the_block():
    model = four_blocks()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(math.inf)
    for method, match in (("shortgpt", "Block 2 gives activations"), ("sleb", "is not finite")):
        with pytest.raises(corank.CorankError, match=match):
            corank.compress(model, method, keep=0.5, tokenizer=tokenizer(), **DATA)
