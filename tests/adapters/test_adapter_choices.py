"""What the methods choose and what their products are, against plain formulas."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from adapter_cases import attached, disturb
from torch import nn

from corank.adaptation import adaptation, adapters
from corank.adapters.products import between, convolved, rotated, rotation_rank
from corank.cli import main
from corank.errors import CorankError
from corank.factorize import Measured
from corank.linalg.components import components
from corank.methods.adapters.curlora import inverted
from corank.statistics import InputGram, InputMoments
from factorized import linears, logits
from tiny import tiny, windows

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
G = torch.Generator


def random(*shape, seed=0):
    return torch.randn(*shape, generator=G().manual_seed(seed), dtype=torch.float64)


def inputs(n, tokens=40, seed=3):
    return random(tokens, n, seed=seed) @ random(n, n, seed=seed + 1) + 0.3


def measured(X):
    gram, moments = InputGram(X.shape[1]), InputMoments(X.shape[1])
    gram.update(X)
    moments.update(X)
    return Measured({"gram": gram.result(), "moments": moments.result()})


def greedy(V):
    """DEIM, step by step as published: where the next vector is interpolated worst."""
    chosen = [int(V[:, 0].abs().argmax())]
    for k in range(1, V.shape[1]):
        coefficients = torch.linalg.solve(V[chosen, :k], V[chosen, k])
        chosen.append(int((V[:, k] - V[:, :k] @ coefficients).abs().argmax()))
    return chosen


@pytest.mark.parametrize("with_data", [False, True])
def test_curing_selects_by_deim_on_the_importance(with_data):
    W, X = random(9, 12), inputs(12)
    I, J = adaptation("curing").choose(W, measured(X) if with_data else None, 4, G())
    S = W.abs() * (X.square().mean(0).sqrt() if with_data else 1.0)
    U, _, Vt = torch.linalg.svd(S, full_matrices=False)
    assert I.tolist() == greedy(U[:, :4]) and J.tolist() == greedy(Vt[:4].T)


def test_calibration_reaches_the_choice():
    model = tiny("llama-gqa", dtype=torch.float64)
    W = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    seen = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=windows().ids)
    hook.remove()
    I, J = adaptation("curing").choose(W, measured(seen[0].flatten(0, 1)), 5, G())
    layer = attached(model, "curing-data").get_base_model().model.layers[1].mlp.down_proj
    assert layer.corank_rows["default"].tolist() == I.tolist()
    assert layer.corank_columns["default"].tolist() == J.tolist()


def test_curlora_prefers_what_is_unimportant():
    energies = torch.tensor([1.0, 4.0, 0.0, 100.0], dtype=torch.float64)
    q = inverted(energies, None)
    p = energies / 105
    torch.testing.assert_close(q, (1 / (p + 2.5e-4)) / (1 / (p + 2.5e-4)).sum())
    assert q.argmax() == 2 and q.argmin() == 3
    published = inverted(torch.full((4096,), 1.0, dtype=torch.float64).index_fill(0, torch.arange(64), 100.0), 1e-3)
    ours = inverted(torch.full((4096,), 1.0, dtype=torch.float64).index_fill(0, torch.arange(64), 100.0), None)
    assert ours.max() / ours.min() > 50 > published.max() / published.min()  # 0.001 drowns the differences
    W = random(6, 8) * torch.tensor([10.0] * 4 + [0.1] * 4, dtype=torch.float64)
    drawn = torch.zeros(8)
    for seed in range(200):
        I, J = adaptation("curlora").choose(W, None, 3, G().manual_seed(seed))
        assert len(set(J.tolist())) == 3 == len(set(I.tolist()))  # none twice
        drawn[J] += 1
    assert drawn[4:].min() > 20 * drawn[:4].max()


def test_tcurlora_selects_by_norms_of_the_transform():
    T = random(5, 7, 9)
    F = np.fft.fft(T.numpy(), axis=0)
    J = np.argsort(-sum(np.linalg.norm(F[k], axis=0) for k in range(5)), kind="stable")[:3]
    I = np.argsort(-sum(np.linalg.norm(F[k][:, J], axis=1) for k in range(5)), kind="stable")[:3]
    rows, columns = adaptation("tcurlora").choose(list(T), 3)
    assert rows.tolist() == I.tolist() and columns.tolist() == J.tolist()


@pytest.mark.parametrize("S", [1, 2, 5, 6])
def test_the_product_of_tensors_is_that_of_the_transforms(S):
    """W + Re ifft(F[:, J] M F[I]): the paper's formula with complex arithmetic, from the real M of the slices."""
    T, core = random(S, 6, 8), random(S, 2, 2, seed=5)
    I, J = torch.tensor([4, 1]), torch.tensor([0, 7])
    F, M = torch.fft.fft(T, dim=0), torch.fft.fft(core, dim=0)
    expected = torch.fft.ifft(F[:, :, J] @ M @ F[:, I], dim=0)
    assert expected.imag.abs().max() < 1e-12
    C, R = torch.cat(list(T[:, :, J]), 1), torch.cat(list(T[:, I]))
    for s in range(S):
        torch.testing.assert_close(C @ convolved(core, s) @ R, expected.real[s], rtol=0, atol=1e-11)
    if S == 1:  # a stack of one is CUR of a matrix
        torch.testing.assert_close(convolved(core, 0), core[0])


def test_a_stack_of_the_model_is_the_tensor_of_its_weights():
    model = tiny("llama-gqa", dtype=torch.float64)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    T = torch.stack([model.get_submodule(n).weight.detach().clone() for n in names])
    adapted = attached(model, "tcurlora", targets=["down"])
    disturb(adapted)
    layers = [adapted.get_base_model().get_submodule(n) for n in names]
    first = layers[0]
    I, J, core = first.corank_rows["default"], first.corank_columns["default"], first.corank_core["default"].detach()
    F, M = torch.fft.fft(T, dim=0), torch.fft.fft(core, dim=0)
    expected = torch.fft.ifft(F[:, :, J] @ M @ F[:, I], dim=0).real
    for s, layer in enumerate(layers):
        torch.testing.assert_close(layer.get_delta_weight("default"), expected[s], rtol=0, atol=1e-11)
    assert [len(layer.corank_core) for layer in layers] == [1, 0, 0]


def test_the_core_of_a_stack_is_trained_by_every_one_of_its_layers():
    """What the released script does not do: M changes after one step, and each slice contributes to its gradient."""
    adapted = attached(tiny("llama-gqa", dtype=torch.float64), "tcurlora", targets=["down"])
    layers = [adapted.get_base_model().get_submodule(f"model.layers.{i}.mlp.down_proj") for i in range(3)]
    core = layers[0].corank_core["default"]
    x = random(4, 37)
    parts = []
    for layer in layers:
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), core)
        assert gradient.abs().min() > 0
        parts.append(gradient)
    sum(layer(x).square().sum() for layer in layers).backward()
    torch.testing.assert_close(core.grad, sum(parts))


@pytest.mark.parametrize("m, n, r", [(8, 12, 6), (7, 5, 6), (3, 4, 10), (12, 9, 2), (20, 3, 4)])
def test_mora_is_pieces_rotated_and_multiplied(m, n, r):
    M, x = random(r, r), random(n)
    pieces = math.ceil(n / r)
    y = []
    for g in range(pieces):
        z = [float(x[(g * r + i) % n]) for i in range(r)]
        turned = []
        for i in range(r):
            angle = g * 10000 ** (-2 * (i % (r // 2)) / r)
            other = -z[i + r // 2] if i < r // 2 else z[i - r // 2]
            turned.append(z[i] * math.cos(angle) + other * math.sin(angle))
        y += (M @ torch.tensor(turned, dtype=torch.float64)).tolist()
    expected = torch.tensor([y[i % len(y)] for i in range(m)], dtype=torch.float64)
    torch.testing.assert_close(rotated(x, M, m), expected, rtol=1e-12, atol=1e-12)
    batch = torch.stack([x, 2 * x])[None]
    torch.testing.assert_close(rotated(batch, M, m), torch.stack([expected, 2 * expected])[None])


def test_mora_trains_as_much_as_a_lora():
    assert [rotation_rank(576, 576, r) for r in (1, 8)] == [34, 96] and rotation_rank(1, 1, 1) == 2
    for m, n, r in ((576, 1536, 8), (192, 576, 4)):
        side = math.sqrt(r * (m + n))  # rounded, then down to an even number: at most 1.5 off
        assert abs(rotation_rank(m, n, r) - side) <= 1.5 and rotation_rank(m, n, r) % 2 == 0


def test_pissa_is_the_truncated_svd_with_the_roots_on_both_sides():
    W = random(7, 10)
    B, A = adaptation("pissa").choose(W, None, 3)
    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(B @ A, U[:, :3] * s[:3] @ Vt[:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(A @ A.T, torch.diag(s[:3]), rtol=0, atol=1e-12)
    torch.testing.assert_close(B.T @ B, torch.diag(s[:3]), rtol=0, atol=1e-12)
    B, A = adaptation("pissa", components="minor").choose(W, None, 3)
    torch.testing.assert_close(B @ A, U[:, -3:] * s[-3:] @ Vt[-3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 10), (10, 7)])
def test_corda_is_the_published_formula_and_without_its_inverse(shape):
    W, X = random(*shape), inputs(shape[1])
    C = X.T @ X / len(X)
    for published, root in ((True, C), (False, torch.from_numpy(scipy.linalg.sqrtm(C.numpy()).real))):
        U, s, Vt = torch.linalg.svd(W @ root, full_matrices=False)
        for which, part in (("principal", slice(0, 3)), ("minor", slice(min(shape) - 3, None))):
            B, A = adaptation("corda", components=which, published=published).choose(W, measured(X), 3)
            expected = U[:, part] * s[part] @ Vt[part] @ torch.linalg.inv(root)
            torch.testing.assert_close(B @ A, expected, rtol=0, atol=1e-7 * float(W.norm()))


def test_principal_components_are_the_best_part_for_the_outputs():
    W, X = random(8, 8), inputs(8)
    B, A = adaptation("corda").choose(W, measured(X), 3)
    reached = ((W - B @ A) @ X.T).square().sum()
    tail = torch.linalg.svdvals(W @ X.T)[3:].square().sum()
    torch.testing.assert_close(reached, tail, rtol=1e-8, atol=0)
    dead = X.clone()
    dead[:, 2:5] = 0  # a singular metric is no obstacle
    B, A = adaptation("corda").choose(W, measured(dead), 8)
    torch.testing.assert_close(B @ A, W, rtol=0, atol=1e-10)


def test_components_of_rank_zero_everything_and_nothing_left():
    W = random(4, 6)
    assert [t.shape for t in components(W, 0)] == [(4, 0), (0, 6)]
    B, A = components(torch.zeros(4, 6), 2)
    assert not B.isnan().any() and not A.isnan().any() and (B @ A == 0).all()
    with pytest.raises(CorankError, match="between 0 and 4"):
        components(W, 5)


@pytest.mark.parametrize("case", ["curing", "curlora", "tcurlora", "mora"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d"])
def test_gradients(case, name):
    """Of a layer with respect to what trains and to its input, against differences."""
    adapted = attached(tiny(name, dtype=torch.float64), case)
    place = "transformer.h.1.mlp.c_proj" if name.startswith("gpt2") else "model.layers.1.mlp.down_proj"
    layer = adapted.get_base_model().get_submodule(place)
    owner = layer.corank_stacks["default"][0][0] if layer.corank_stacks else layer
    core = owner.corank_core["default"]
    disturb(adapted)
    x = random(2, layer.in_features).requires_grad_()
    assert core.requires_grad and torch.autograd.gradcheck(lambda *_: layer(x), (x, core), atol=1e-8)


def test_factors_are_not_multiplied_out():
    x, C, M, R = random(3, 9), random(7, 2), random(2, 2, seed=1), random(2, 9, seed=2)
    torch.testing.assert_close(between(x, C, M, R), x @ (C @ M @ R).T)
    adapted = attached(tiny("llama-gqa"), "curing", targets=["q"])
    ids = torch.randint(3, 60, (1, 4))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        adapted.get_base_model().model.layers[0].self_attn.q_proj(adapted.get_base_model().model.embed_tokens(ids))
    assert (24, 24) not in sizes and {tuple(sorted(s)) for s in sizes} >= {(5, 24)}


def test_listing():
    found = adapters()
    assert list(found) == sorted(found) and {"curing", "curlora", "tcurlora", "mora", "pissa", "corda"} <= set(found)
    for method in found.values():
        assert (
            method.family == "adapters" and method.cite and method.summary.endswith(".") and "rank" in method.parameters
        )
        assert method.recipe(rank="3").rank == 3
    assert isinstance(found["curing"].doc, str) and "W + C M R" in found["curing"].doc


def test_the_command_line_lists_adapters_beside_methods(capsys):
    assert main(["methods", "--json"]) == 0
    listed = {(row["name"], row["family"]) for row in json.loads(capsys.readouterr().out)}
    assert {(name, "adapters") for name in adapters()} < listed and ("curing", "weights") in listed
    assert main(["methods", "curing"]) == 0  # a method and an adapter of one paper: both
    printed = capsys.readouterr().out
    assert "CUR of q, k and gate" in printed and "as keywords of corank.adapters.attach:\n  rank=64" in printed
    assert main(["methods", "curlora"]) == 0 and "2408.14572" in capsys.readouterr().out


def test_updates_stay_in_the_span_of_columns_and_rows():
    adapted = attached(tiny("llama-gqa", dtype=torch.float64), "curlora")
    bare = {n: layer.weight.detach() for n, layer in linears(tiny("llama-gqa", dtype=torch.float64)).items()}
    disturb(adapted)
    for name, W in bare.items():
        layer = adapted.get_base_model().get_submodule(name)
        I, J, delta = layer.corank_rows["default"], layer.corank_columns["default"], layer.get_delta_weight("default")
        assert torch.linalg.matrix_rank(delta) <= 5
        for span, target in ((W[:, J], delta), (W[I].T, delta.T)):
            assert (span @ torch.linalg.lstsq(span, target).solution - target).abs().max() < 1e-10
        core = layer.corank_core["default"].detach()
        torch.testing.assert_close(delta, 2.0 * W[:, J] @ core @ W[I], rtol=0, atol=1e-12)
    assert logits(adapted).isfinite().all() and isinstance(adapted, nn.Module)
