"""The losses that healing minimises: by hand, and their gradients by finite differences in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from corank.heal.blocks import squared
from corank.heal.distillation import Predictions, lumped_kl
from corank.heal.ways.curing import hidden_loss, next_token_loss
from corank.heal.ways.lillama import both_paths, feature_loss
from corank.heal.ways.local import relative_error


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variable(*shape, seed=1):
    return numbers(*shape, seed=seed).requires_grad_()


def lumped(teacher, k):
    values, places = teacher.topk(k, -1)
    return places, values, teacher.scatter(-1, places, -math.inf).logsumexp(-1)


MASK = torch.tensor([True, True, False, True, False])


@pytest.mark.parametrize("mask", [None, MASK])
def test_gradients_are_those_of_finite_differences(mask):
    ids = torch.tensor([3, 0, 2, 6, 1])
    assert torch.autograd.gradcheck(lambda x: next_token_loss(x, ids, mask), variable(5, 7))
    taught = numbers(2, 5, 3)
    assert torch.autograd.gradcheck(lambda a, b: hidden_loss([a, b], taught, mask), (variable(5, 3), variable(5, 3)))
    y = numbers(5, 4)
    assert torch.autograd.gradcheck(lambda z: feature_loss(y, z, mask), variable(5, 4))
    assert torch.autograd.gradcheck(lambda z: squared(y - z, mask), variable(5, 4))
    x, seen = numbers(5, 3), numbers(5, 3, seed=2)
    for rule in (relative_error, both_paths):
        assert torch.autograd.gradcheck(lambda w, rule=rule: rule(lambda v: v @ w.T, x, seen, y, mask), variable(4, 3))


@pytest.mark.parametrize("k", [3, 9])
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_the_divergence_has_the_gradient_of_finite_differences(k, temperature):
    teacher = (numbers(2, 9) / temperature).log_softmax(-1)
    taught = Predictions(*(t[None] for t in lumped(teacher, k)), None, temperature)
    assert torch.autograd.gradcheck(lambda x: taught.divergence(x[None], [0]), variable(2, 9))
    at_teacher = numbers(2, 9).requires_grad_()
    (g,) = torch.autograd.grad(taught.divergence(at_teacher[None], [0]), at_teacher)
    assert float(g.abs().max()) < 1e-12


def test_the_divergence_at_a_temperature_is_that_of_softened_distributions():
    teacher, student = numbers(4, 9), numbers(4, 9, seed=5)
    p, q = (teacher / 10).log_softmax(-1), (student / 10).log_softmax(-1)
    taught = Predictions(*(t[None] for t in lumped(p, 9)), None, 10.0)
    torch.testing.assert_close(taught.divergence(student[None], [0]), (p.exp() * (p - q)).sum(-1).mean())


def test_the_next_token_is_predicted_from_and_to_real_tokens_alone():
    logits, ids = numbers(5, 7), torch.tensor([3, 0, 2, 6, 1])
    log = logits.log_softmax(-1)
    torch.testing.assert_close(next_token_loss(logits, ids, None), -sum(log[t, ids[t + 1]] for t in range(4)) / 4)
    torch.testing.assert_close(
        next_token_loss(logits, ids, MASK), -log[0, ids[1]]
    )  # of 0, 1 and 3 only 0 -> 1 is a pair
    nothing = torch.tensor([True, False, False, False, False])
    assert float(next_token_loss(logits, ids, nothing)) == 0


def test_what_stands_at_padding_does_not_count():
    taught, mine = numbers(2, 5, 3), numbers(2, 5, 3, seed=3)
    other = mine.clone()
    other[:, ~MASK] += 100
    first, second = (hidden_loss(list(h), taught, MASK) for h in (mine, other))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, (mine - taught)[:, MASK].square().mean())
    torch.testing.assert_close(hidden_loss(list(mine), taught, None), (mine - taught).square().mean())
    assert torch.equal(feature_loss(taught[0], mine[0], MASK), feature_loss(taught[0], other[0], MASK))


def test_distance_and_direction_by_hand():
    y, z = numbers(5, 4), numbers(5, 4, seed=4)
    cosine = (y * z).sum(-1) / (y.norm(dim=-1) * z.norm(dim=-1))
    by_hand = (y - z).abs().mean() + (1 + (-cosine).exp()).log().mean()
    torch.testing.assert_close(feature_loss(y, z), by_hand)
    assert float(feature_loss(y, y)) == pytest.approx(math.log(1 + math.exp(-1)))  # its least value


def test_sixteen_bits_are_compared_in_thirty_two():
    y = numbers(5, 4).bfloat16()
    assert squared(y, None).dtype == feature_loss(y, y).dtype == torch.float32
    assert lumped_kl(y, *lumped(y.float().log_softmax(-1), 2)).dtype == torch.float32
