"""What every local way starts from, against the same computed by the models' own forward passes and hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from corank.factors import FactorizedLinear
from corank.heal import Schedule, train
from corank.heal.training import divide
from corank.model import ResidentModel
from factorized import compressed
from tiny import tiny, windows

LAYERS = 3


@pytest.fixture(scope="module", params=[False, True], ids=["full", "padded"])
def case(request):
    """Dense and compressed model, data, and the held-out sequence with its mask of real tokens."""
    dense = tiny("llama-gqa")
    model = compressed("low_rank", ranks=(8, 5), layers=LAYERS)
    data = windows(6, padded=request.param)
    (held,) = divide(6)[1]
    real = torch.ones(16, dtype=torch.bool) if data.mask is None else data.mask[held]
    return dense, model, data, held, real


def before(case, how, **rest):
    """Losses on the held-out sequence before any training, block by block."""
    dense, model, data, _, _ = case
    healed = train(ResidentModel(model), ResidentModel(dense), data, how, schedule=Schedule(epochs=0), **rest)
    return [h["heldout"][0] for h in healed.history]


def run(model, data, which, hooked=()):
    """Hidden states behind each block, logits, and what some modules were given, for one sequence."""
    seen, states, handles = {}, [], []
    for name in hooked:
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0][0])))
    for block in model.model.layers:
        note = lambda m, args, out: states.append((out[0] if isinstance(out, tuple) else out)[0])  # noqa: E731
        handles.append(block.register_forward_hook(note))
    mask = None if data.mask is None else data.mask[[which]].long()
    with torch.no_grad():
        logits = model(input_ids=data.ids[[which]], attention_mask=mask).logits[0]
    for handle in handles:
        handle.remove()
    return states, logits, seen


def scale_of(model, data, layer):
    """Mean square of what a block puts out, the mean over all sequences."""
    each = []
    for i in range(len(data.ids)):
        h = run(model, data, i)[0][layer]
        each.append(float((h if data.mask is None else h[data.mask[i]]).square().mean()))
    return sum(each) / len(each)


def test_the_error_of_a_block(case):
    dense, model, data, held, real = case
    found, losses = before(case, "block"), []
    for layer in range(LAYERS):
        mine, other = (run(m, data, held)[0][layer][real] for m in (model, dense))
        losses.append(float((mine - other).square().mean()) / scale_of(dense, data, layer))
    assert found == pytest.approx(losses, rel=1e-4)


def test_looking_ahead(case):
    dense, model, data, held, real = case
    block, found = before(case, "block"), before(case, "lookahead")
    for layer in range(LAYERS - 1):
        hybrid = copy.deepcopy(model)
        hybrid.model.layers[layer + 1] = copy.deepcopy(dense.model.layers[layer + 1])
        mine, other = (run(m, data, held)[0][layer + 1][real] for m in (hybrid, dense))
        ahead = float((mine - other).square().mean()) / scale_of(dense, data, layer + 1)
        assert found[layer] == pytest.approx(block[layer] + ahead, rel=1e-4)
    assert found[-1] == pytest.approx(block[-1])


def outputs(case, layer):
    """(dense output, the compressed layer, dense input, input it will see) of the real tokens, for each matrix of a block."""
    dense, model, data, held, real = case
    place = f"model.layers.{layer}."
    names = [n for n, m in model.named_modules() if isinstance(m, FactorizedLinear) and n.startswith(place)]
    _, _, x = run(dense, data, held, names)
    _, _, seen = run(model, data, held, names)
    with torch.no_grad():
        for n in names:
            yield dense.get_submodule(n)(x[n][real]), model.get_submodule(n), x[n][real], seen[n][real]


def test_the_error_of_each_matrix(case):
    found = before(case, "local")
    with torch.no_grad():
        for layer in range(LAYERS):
            each = [float((y - m(z)).square().sum() / y.square().sum()) for y, m, _, z in outputs(case, layer)]
            assert found[layer] == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_distance_and_direction_from_both_inputs(case):
    def loss(y, z):
        cosine = functional.cosine_similarity(y, z)
        return float((y - z).abs().mean() + (1 + (-cosine).exp()).log().mean())

    found = before(case, "lillama")
    with torch.no_grad():
        for layer in range(LAYERS):
            each = [(loss(y, m(x)) + loss(y, m(z))) / 2 for y, m, x, z in outputs(case, layer)]
            assert found[layer] == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_the_loss_of_curing(case):
    dense, model, data, held, real = case
    (found,) = before(case, "curing", what="matrices")
    (mine, logits, _), (other, _, _) = (run(m, data, held) for m in (model, dense))
    distance = sum((a[real] - b[real]).square().mean() for a, b in zip(mine[:-1], other[:-1], strict=True)) / (
        LAYERS - 1
    )
    labels = data.ids[held].masked_fill(~real, -100)
    text = functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
    assert found == pytest.approx(float(0.1 * text + 0.9 * distance), rel=1e-4)


def test_gradients_stay_inside_their_matrix(case):
    """A matrix learns the same whatever the others of its block do, as long as it reads the same."""
    dense, model, data, _, _ = case
    results = []
    for ranks_of_value in (False, True):
        other = copy.deepcopy(model)
        if ranks_of_value:  # v reads what q reads, and q does not read v
            nn.init.zeros_(other.model.layers[0].self_attn.v_proj.up.weight)
        schedule = Schedule(epochs=1, learning_rate=1e-4, clip=1e9, checks=1)
        train(ResidentModel(other), ResidentModel(dense), data, "local", schedule=schedule, what="matrices")
        results.append(other.model.layers[0].self_attn.q_proj)
    assert not torch.equal(results[0].up.weight, model.model.layers[0].self_attn.q_proj.up.weight)
    for part in ("up", "down"):
        assert torch.equal(getattr(results[0], part).weight, getattr(results[1], part).weight)
