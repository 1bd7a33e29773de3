"""A basis read by several layers: stored once, trained once, copied once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from corank.errors import CorankError
from corank.factors import LowRankLinear, SharedBasis, SharedLowRankLinear, count_shared, wire


def group(dtype=torch.float64):
    torch.manual_seed(0)
    rand = lambda *size: torch.randn(*size, dtype=dtype)  # noqa: E731
    return SharedBasis(rand(3, 5), {"q": rand(7, 3), "k": rand(4, 3), "v": rand(4, 3)})


class Attention(nn.Module):
    """Registers the followers before the owner, the harder order for copying."""

    def __init__(self, layers):
        super().__init__()
        self.v, self.k, self.q = layers["v"], layers["k"], layers["q"]

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def test_layers_compute_their_products_and_the_basis_is_stored_once():
    shared = group()
    biases = {"k": torch.ones(4, dtype=torch.float64)}
    model = Attention(shared.modules(biases))
    x = torch.randn(6, 5, dtype=torch.float64)
    W = torch.cat([B @ shared.basis for B in shared.coefficients.values()])
    b = torch.cat([torch.zeros(7), torch.ones(4), torch.zeros(4)]).double()
    torch.testing.assert_close(model(x), x @ W.T + b, rtol=1e-12, atol=1e-12)
    assert isinstance(model.q, LowRankLinear) and isinstance(model.k, SharedLowRankLinear)
    stored = sum(t.numel() for t in model.state_dict().values()) - 4
    assert shared.numel == stored == count_shared([7, 4, 4], 5, 3) == 3 * (5 + 15)
    assert count_shared([], 5, 3) == 0
    assert [name for name in model.state_dict() if "down" in name] == ["q.down.weight"]
    torch.testing.assert_close(model.k.dense_weight(), shared.coefficients["k"] @ shared.basis)
    assert model.k.spec()["basis"] == "q"


def test_one_gradient_for_the_basis_from_all_readers():
    shared = group()
    model = Attention(shared.modules())
    x = torch.randn(6, 5, dtype=torch.float64)
    model(x).sum().backward()
    ones = torch.ones(6, 1, dtype=torch.float64)
    expected = sum(B.sum(0, keepdim=True).T @ (ones.T @ x) for B in shared.coefficients.values())
    torch.testing.assert_close(model.q.down.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_deepcopy_keeps_the_sharing_inside_the_copy():
    model = Attention(group().modules())
    clone = copy.deepcopy(model)
    assert clone.k.down is clone.q.down and clone.v.down is clone.q.down
    assert clone.q.down is not model.q.down
    clone.to(torch.bfloat16)
    assert clone(torch.randn(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_replaced_down_of_the_owner_is_seen_by_the_followers():
    model = Attention(group().modules())
    x = torch.randn(6, 5, dtype=torch.float64)
    zero = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    nn.init.zeros_(zero.weight)
    model.q.down = zero
    assert torch.equal(model(x), torch.zeros(6, 15, dtype=torch.float64))


def test_wiring_after_rebuilding_from_specs():
    model = Attention(group().modules())
    empty = Attention(
        {
            name: type(layer).from_spec(layer.spec(), bias=False, device="cpu", dtype=torch.float64)
            for name, layer in model.named_children()
        }
    )
    x = torch.randn(6, 5, dtype=torch.float64)
    with pytest.raises(CorankError, match="not wired"):
        empty(x)
    wire(empty)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(x), model(x))
    empty.k.basis = "nowhere"
    with pytest.raises(CorankError, match="does not exist"):
        wire(empty)
    with pytest.raises(CorankError, match="holds no basis"):
        model.k.follow(nn.Linear(5, 3))


def test_inconsistent_groups_are_refused():
    with pytest.raises(CorankError):
        SharedBasis(torch.zeros(3, 5), {})
    with pytest.raises(CorankError):
        SharedBasis(torch.zeros(3, 5), {"q": torch.zeros(4, 2)})
