"""The products of a layer add up to the operations and the bytes that its factors count themselves."""

from __future__ import annotations

import pytest
import torch

from corank.checkpoint.skeleton import empty_layer
from corank.errors import CorankError
from corank.factors import KINDS, LowRank
from corank.timing import Device, break_even_rank, break_even_size, find_device, matrix_seconds
from corank.timing.kernels import Product, kernels_of, parts_at, parts_from, parts_of, together

H200 = find_device("h200")
ROUND = Device("round numbers", "float32", bytes_per_s=1e9, flops_per_s=1e10, kernel_s=1e-6)
SIZES = [((24, 40), 5), ((40, 24), 24), ((16, 16), 1), ((7, 3), 0)]
STORED = sorted(set(KINDS) - {"dense"})


@pytest.mark.parametrize(("shape", "rank"), SIZES)
@pytest.mark.parametrize("kind", STORED)
def test_products_add_up_to_what_the_factors_count(kind, shape, rank):
    spec = {"kind": kind, "shape": list(shape), "rank": rank, "basis": "other", "bias": False}
    layer = empty_layer(spec, "meta", torch.float32)
    if kind == "shared":
        owner = empty_layer({**spec, "kind": "low_rank"}, "meta", torch.float32)
        layer.follow(owner)
    factors = layer.factors()
    parts = parts_of(layer, "layer")
    assert parts == parts_from(spec, "layer")
    assert sum(p.flops(3) for p in parts.products) == factors.flops(3)
    own = [p for p in parts.products if p.weight.startswith("layer")]
    indices = 4 * rank if "pivoted" in kind else 0
    assert sum(p.weight_bytes(ROUND) for p in own) + indices == factors.nbytes
    assert [(p.out, p.inner) for p in parts.products][0][1] <= shape[1] and parts.products[-1].out <= shape[0]
    assert bool(parts.move.launches) == ("pivoted" in kind)


def test_a_dense_matrix_is_one_product():
    (kernel,) = kernels_of(parts_at("low_rank", (24, 40), None), 3, ROUND)
    assert kernel.flops == 2 * 3 * 24 * 40 and kernel.nbytes == 4 * (24 * 40 + 3 * 24 + 3 * 40)
    assert kernel.seconds(ROUND) == pytest.approx(1e-6 + max(kernel.nbytes / 1e9, kernel.flops / 1e10))
    assert parts_of(torch.nn.Linear(40, 24), "x") == parts_from({"kind": "dense", "shape": [24, 40], "rank": 24}, "x")


def test_bytes_of_a_pair_are_those_of_the_formula():
    m, n, r, T = 24, 40, 5, 3
    kernels = kernels_of(parts_at("low_rank", (m, n), r), T, H200)
    assert sum(k.nbytes for k in kernels) == 2 * (r * (m + n) + T * n + 2 * T * r + T * m)
    assert sum(k.flops for k in kernels) == LowRank(torch.empty(m, r), torch.empty(r, n)).flops(T)


def test_siblings_read_their_input_and_a_shared_basis_once():
    a, b = Product("a.down", 5, 40), Product("b.down", 7, 40)
    kernel = together([a, b], 3, ROUND, "down")
    assert kernel.launches == 1 and kernel.nbytes == 4 * (12 * 40 + 3 * (40 + 12))
    assert together([a, a], 3, ROUND, "down") == together([a], 3, ROUND, "down")
    ups = together([Product("a.up", 24, 5), Product("b.up", 8, 7)], 3, ROUND, "up", one_input=False)
    assert ups.nbytes == 4 * (24 * 5 + 8 * 7 + 3 * (12 + 32))


def test_integers_are_fewer_bytes():
    spec = {"kind": "low_rank", "shape": [24, 40], "rank": 5, "quantized": {"down": {"bits": 8, "scale": "float32"}}}
    down, up = parts_from(spec, "x").products
    assert (down.weight_bytes(ROUND), up.weight_bytes(ROUND)) == (5 * 40, 4 * 5 * 24)


# dense microseconds of the bytes; and per rank the bytes' microseconds, the speed-up of two launches and of a fused one
SINGLE = {
    (4096, 4096): (7.8, [(1600, 6.1, 0.93, 1.05), (1216, 4.6, 1.07, 1.24), (1024, 3.9, 1.16, 1.36)]),
    (1024, 4096): (1.95, [(640, 1.5, 0.68, 0.85), (448, 1.1, 0.73, 0.93), (384, 0.9, 0.75, 0.96)]),
    (14336, 4096): (27.3, [(2496, 21.4, 1.13, 1.19), (1856, 15.9, 1.43, 1.52), (1536, 13.2, 1.64, 1.77)]),
    (8192, 8192): (31.2, [(3264, 24.9, 1.13, 1.18), (2432, 18.5, 1.43, 1.52), (2048, 15.6, 1.64, 1.75)]),
}


@pytest.mark.parametrize("shape", SINGLE)
def test_the_table_of_single_matrices(shape):
    dense_us, rows = SINGLE[shape]
    dense = matrix_seconds(shape, None, H200)
    assert 1e6 * (dense - H200.kernel_s) == pytest.approx(dense_us, abs=0.06)
    for rank, us, two, fused in rows:
        seconds = matrix_seconds(shape, rank, H200)
        assert 1e6 * (seconds - 2 * H200.kernel_s) == pytest.approx(us, abs=0.06)
        assert dense / seconds == pytest.approx(two, abs=0.006)
        assert dense / (seconds - H200.kernel_s + 1.2e-6) == pytest.approx(fused, abs=0.006)


@pytest.mark.parametrize("kind", ["low_rank", "cur", "row_pivoted", "column_pivoted"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_time_never_falls_with_rank_or_tokens(kind, tokens):
    times = [matrix_seconds((96, 64), r, ROUND, tokens, kind) for r in range(65)]
    assert times == sorted(times)
    assert all(matrix_seconds((96, 64), r, ROUND, tokens + 1, kind) > t for r, t in enumerate(times))


@pytest.mark.parametrize("step", [1, 8, 30])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("kernel_s", [0.0, 1e-6, 1e-3])
def test_the_break_even_rank_is_what_trying_all_ranks_finds(step, tokens, kernel_s):
    device = Device("x", "float32", 1e9, 1e11, kernel_s=kernel_s)
    for shape in ((96, 64), (40, 200)):
        dense = matrix_seconds(shape, None, device, tokens)
        faster = [r for r in range(step, min(shape) + 1, step) if matrix_seconds(shape, r, device, tokens) < dense]
        assert break_even_rank(shape, device, tokens, multiple_of=step) == max(faster, default=None)


@pytest.mark.parametrize(("keep", "millions"), [(0.8, 27), (0.6, 13), (0.5, 11)])
def test_the_break_even_size_is_where_the_time_of_two_launches_meets_the_dense_one(keep, millions):
    size = break_even_size(keep, H200)
    assert size / 1e6 == pytest.approx(millions, abs=0.5)
    for factor, pays in ((0.98, False), (1.02, True)):
        n = round((size * factor) ** 0.5 / 16) * 16
        rank = int(keep * n / 2)
        few = Device(**{**H200.to_json(), "quantum": 1})
        assert (matrix_seconds((n, n), rank, few) < matrix_seconds((n, n), None, few)) is pays
    assert break_even_size(1.0, H200) == float("inf")


def test_bad_devices_are_refused():
    for wrong in ({"bytes_per_s": 0.0}, {"dtype": "int8"}, {"quantum": 0}, {"kernel_s": -1.0}):
        with pytest.raises(CorankError):
            Device(**{**ROUND.to_json(), **wrong})
