"""LoRAP's two halves: how parameters are shared, what is truncated, and that the result is counted and stored right."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_width_methods import compress, logits
from width_blocks import block_of, llama

import corank
from corank.errors import CorankError
from corank.factors import FactorizedLinear
from corank.model.site import Site
from corank.recipe import get
from corank.structured.attention import matrices, split
from corank.structured.moments import moments
from corank.structured.narrow import narrow
from tiny import saved, tiny

QKVO = ("q", "k", "v", "o")


def attention(d, grouped=None, heads=None):
    """Sites of an attention whose keys and values have `grouped` rows, queries `heads`."""
    kv, q = grouped or d, heads or d
    shapes = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
    names = {role: f"model.layers.0.self_attn.{role}_proj" for role in shapes}
    return {role: Site(names[role], role, 0, shape, names["q"], False) for role, shape in shapes.items()}


def stored(sites, ranks, roles):
    """Parameters of some of the matrices."""
    return sum(
        s.numel if s.name not in ranks else ranks[s.name] * sum(s.shape) for s in (sites[role] for role in roles)
    )


def test_square_matrices_get_the_ranks_of_the_paper():
    sites = attention(4096)
    names = {role: s.name for role, s in sites.items()}
    ranks = split(sites, 0.8 * 4 * 4096**2, 3.0)
    assert ranks == {names["q"]: 1228, names["k"]: 1228}  # values and outputs stay dense
    ranks = split(sites, 0.5 * 4 * 4096**2, 3.0)
    assert {role: ranks[names[role]] for role in QKVO} == {"q": 512, "k": 512, "v": 1536, "o": 1536}
    assert split(sites, 4 * 4096**2, 3.0) == {}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("keep", [0.15, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("shape", [(96, 24, 96), (96, 32, 128), (60, 60, 60)])
def test_the_split_holds_for_any_shapes_and_never_exceeds_its_budget(shape, keep, alpha):
    d, grouped, heads = shape
    sites = attention(d, grouped, heads)
    dense = sum(s.numel for s in sites.values())
    ranks = split(sites, keep * dense, alpha)
    step = sum(sum(s.shape) for s in sites.values())  # one rank of each
    assert keep * dense - step < stored(sites, ranks, QKVO) <= keep * dense + 1e-6
    spent, saved_ = stored(sites, ranks, "vo"), stored(sites, ranks, "qk")
    if len(ranks) == 4:  # not clipped
        assert spent - alpha * saved_ == pytest.approx(0, abs=(1 + alpha) * step)
    for role in QKVO:
        rank = ranks.get(sites[role].name)
        assert rank is None or rank * sum(sites[role].shape) < sites[role].numel


def test_the_matrices_are_the_best_of_their_rank_for_the_weighted_inputs():
    """Against an SVD of W D, undone on the right, from statistics that the block as it came has."""
    recipe = get("lorap").recipe()
    block = block_of(llama(), recipe)
    before = {path: m.weight.detach().clone() for path, m in block.module.named_modules() if hasattr(m, "weight")}
    ranks = {"self_attn.q_proj": 4, "self_attn.k_proj": 3, "self_attn.v_proj": 5, "self_attn.o_proj": 9}
    seen = moments(block, ranks, full=False)
    target = dataclasses.replace(block.shape, channels=30, ranks=tuple(sorted(ranks.items())))
    assert narrow(block, target).shape == target
    for path, k in ranks.items():
        layer = block.module.get_submodule(path)
        W, D = before[path], seen[path].energy.sqrt()
        U, S, Vt = torch.linalg.svd(W * D, full_matrices=False)
        assert isinstance(layer, FactorizedLinear) and layer.rank == k
        assert torch.allclose(layer.dense_weight(), U[:, :k] * S[:k] @ Vt[:k] / D, rtol=1e-9, atol=1e-9)
        lost = ((W - layer.dense_weight()) * D).square().sum()
        assert torch.allclose(lost, S[k:].square().sum())
    assert block.module.mlp.up_proj.out_features == 30


def test_inputs_of_one_size_make_it_a_plain_truncation():
    recipe = get("lorap").recipe()
    block = block_of(llama(), recipe)
    from corank.structured.attention import factorize
    from corank.structured.moments import Moments

    W = block.module.self_attn.q_proj.weight.detach().clone()
    even = Moments(torch.full((24,), 0.7, dtype=torch.float64), torch.zeros(24, dtype=torch.float64), 99)
    factorize(block, {"self_attn.q_proj": 6}, {"self_attn.q_proj": even})
    U, S, Vt = torch.linalg.svd(W)
    assert torch.allclose(block.module.self_attn.q_proj.dense_weight(), U[:, :6] * S[:6] @ Vt[:6], atol=1e-10)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-bias"])
def test_both_halves_count_and_come_back(name, tmp_path):
    model = tiny(name, dtype=torch.float64)
    dense = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.ndim == 2)
    report = compress(model, "lorap", tmp_path / "out", keep=0.6)
    kept = {}
    for row in report.sites:
        half = "attention" if row["role"] in QKVO else "channels"
        counts = kept.setdefault(half, [0, 0])
        counts[0] += row["params"]
        counts[1] += row["params_dense"]
        module = model.get_submodule(row["name"])
        weights = [p for n, p in module.named_parameters() if "bias" not in n]
        assert sum(p.numel() for p in weights) == row["params"]
        assert (row["kind"] == "low_rank") == isinstance(module, FactorizedLinear)
    assert sum(row["params"] for row in report.sites) <= 0.6 * dense
    for params, before in kept.values():  # one rank of each matrix, or one channel of each block, is the grain
        assert params / before == pytest.approx(0.6, abs=0.06)
    assert report.extra["structure"]["class"] == "N4" and not report.ordinary
    loaded, _ = corank.load(tmp_path / "out", dtype=torch.float64)
    assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-12)
    assert sum(p.numel() for p in loaded.parameters()) == report.accounting["model"]["compressed"]
    corank.verify(tmp_path / "out")


def test_from_disk_to_disk_and_a_clipped_pair(tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    report = compress(str(folder), "lorap", tmp_path / "out", keep=0.8)
    kinds = {(row["role"], row["kind"]) for row in report.sites if row["role"] in QKVO}
    assert kinds == {("q", "low_rank"), ("k", "low_rank"), ("v", "dense"), ("o", "dense")}
    model = tiny("llama-gqa")
    compress(model, "lorap", keep=0.8)
    assert torch.allclose(logits(corank.load(tmp_path / "out")[0]), logits(model), atol=1e-4)


def test_where_there_is_nothing_to_factorize_channels_pay_alone(tmp_path):
    model = tiny("phi3-fused")
    report = compress(model, "lorap", keep=0.8)
    assert any("stays dense: it has no q, k, v and o" in w for w in report.warnings)
    assert {row["kind"] for row in report.sites if row["role"] in ("qkv", "o")} == {"dense"}
    with pytest.raises(CorankError, match="set attention=false"):
        compress(tiny("llama-gqa"), "lorap", keep=0.8, uniform=True)
    with pytest.raises(CorankError, match="give a positive number"):
        compress(tiny("llama-gqa"), "lorap", keep=0.8, alpha=0.0)
    model = tiny("llama-gqa")
    report = compress(model, "lorap", keep=0.8, attention=False)
    assert report.ordinary and math.isclose(report.kept(), 0.8, abs_tol=0.02)


def test_attention_is_known_by_its_four_matrices():
    sites = list(attention(24, 12).values())
    assert set(matrices(sites)) == set(QKVO)
    assert matrices(sites[:3]) == {} and matrices([*sites, dataclasses.replace(sites[0], name="other")]) == {}
    assert matrices([dataclasses.replace(s, pool="experts") for s in sites]) == {}
