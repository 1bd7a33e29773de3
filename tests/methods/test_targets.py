"""What a layer is to reproduce, and on which inputs: every target is the optimum of the problem it states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import corank
from corank import recipe
from corank.engine.gradients import sweep
from corank.engine.site import factorize_site
from corank.engine.target import MIXES
from corank.errors import CorankError
from corank.factorize import Measured
from corank.factors import weight_of
from corank.linalg import alternate, retarget, truncate
from corank.model import ResidentModel, Site, Text, calibration
from corank.statistics import CrossGram, GradientGram, InputGram
from tiny import saved, text, tiny, tokenizer

M, N, TOKENS = 9, 12, 80
TEXT = Text(text(), "words")
DATA = dict(data=TEXT, samples=6, length=16, batch=4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Streams:
    """Dense inputs x, drifted inputs x^, output gradients, and all that is measured of them; rows are tokens."""

    def __init__(self, tokens: int = TOKENS, drift: float = 0.4, mean: float = 0.0, seed: int = 0):
        self.W = randn(M, N, seed=seed)
        self.X = randn(tokens, N, seed=seed + 1) @ randn(N, N, seed=seed + 2) + mean
        self.Z = self.X + drift * randn(tokens, N, seed=seed + 3) @ randn(N, N, seed=seed + 4) + drift * mean
        self.g = randn(tokens, M, seed=seed + 5) @ randn(M, M, seed=seed + 6)
        dense, drifted, gradient = InputGram(N), InputGram(N), GradientGram(M)
        cross = CrossGram(N)
        dense.update(self.X[None])
        drifted.update(self.Z[None])
        gradient.update(self.g[None])
        cross.update(self.X[None], self.Z[None])
        self.dense, self.drifted, self.cross = dense.result(), drifted.result(), cross.result()
        self.gradient = gradient.result()

    def make(self, name: str, rank: int, bias: Tensor | None = None, **settings):
        """The replacement of the layer as the engine makes it, from what the engine would hand over."""
        made = recipe.get(name).recipe(**settings)
        gram = self.drifted if made.drifted else self.dense
        results = {"gram": gram, "gradient": self.gradient, "clipped-gradient": self.gradient}
        return factorize_site(
            made,
            Site("model.layers.0.x", "q", 0, (M, N), "model.layers.0.x", bias is not None),
            self.W,
            bias,
            Measured(results, {}, made.affine),
            rank,
            seed=0,
            dtype=torch.float64,
            drifted=self.drifted if made.refits else None,
            cross=self.cross if made.anchored else None,
        )

    def weight(self, name: str, rank: int, **settings) -> Tensor:
        return self.make(name, rank, **settings).module.dense_weight()

    def error(self, W_new: Tensor, mix: float = 1.0, R: Tensor | None = None, rho: float = 0.0) -> float:
        """E|| L (t W x + (1 - t) W x^ - W' x^) ||^2 + rho || L (W - W') ||^2, from the tokens themselves."""
        L = torch.eye(M, dtype=torch.float64) if R is None else torch.linalg.cholesky(R).T
        wanted = mix * self.X @ self.W.T + (1 - mix) * self.Z @ self.W.T
        miss = (wanted - self.Z @ W_new.T) @ L.T
        return float(miss.square().sum() / len(self.X) + rho * (L @ (self.W - W_new)).square().sum())

    def best(self, rank: int, mix: float = 1.0, R: Tensor | None = None, rho: float = 0.0) -> float:
        """The least such error of any rank-k matrix: reduced-rank regression by projections and an SVD of the data."""
        L = torch.eye(M, dtype=torch.float64) if R is None else torch.linalg.cholesky(R).T
        scale = len(self.X) ** -0.5
        wanted = torch.cat([scale * (mix * self.X + (1 - mix) * self.Z) @ self.W.T, rho**0.5 * self.W.T])
        inputs = torch.cat([scale * self.Z, rho**0.5 * torch.eye(N, dtype=torch.float64)])
        U, s, _ = torch.linalg.svd(inputs, full_matrices=False)
        U = U[:, s > 1e-10 * s[0]]
        wanted = wanted @ L.T
        kept = torch.linalg.svdvals(U @ (U.T @ wanted))[:rank]
        return float(wanted.square().sum() - kept.square().sum())


MIXED = {
    "shifted": (dict(target="shifted"), 0.0),
    "anchored": (dict(target="anchored"), 1.0),
    "mixed": (dict(target="mixed", mix=0.3), 0.3),
}


@pytest.mark.parametrize("tokens", [7, TOKENS])
@pytest.mark.parametrize("target", MIXED)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_no_matrix_of_that_rank_comes_nearer_to_the_target(target, rank, tokens):
    data = Streams(tokens)
    settings, mix = MIXED[target]
    found = data.weight("svd-llm", rank, ridge=0.0, **settings)
    assert torch.linalg.matrix_rank(found) <= rank
    assert data.error(found, mix) == pytest.approx(data.best(rank, mix), rel=1e-8, abs=1e-9)
    for seed in range(20):  # nothing in the neighbourhood is better either
        nudge = randn(M, rank, seed=seed) @ randn(rank, N, seed=seed + 50)
        B, A = data.make("svd-llm", rank, ridge=0.0, **settings).factors.pair()
        other = (B + 1e-3 * nudge[:, :rank]) @ (A + 1e-3 * nudge[:rank] if rank <= M else A)
        assert data.error(other, mix) >= data.error(found, mix) * (1 - 1e-12)


@pytest.mark.parametrize("target", MIXED)
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("name", ["best", "kfac-svd"])
def test_the_two_sided_metric_goes_with_every_target(name, target, rank):
    """min || R^{1/2} (T - W' X^) || with R and H as measured, and with both shrunk."""
    data = Streams()
    settings, mix = MIXED[target]
    found = data.weight(name, rank, shrink_inputs=0.0, shrink_outputs=0.0, ridge=0.0, **settings)
    R = data.gradient.R
    assert data.error(found, mix, R) == pytest.approx(data.best(rank, mix, R), rel=1e-8)
    found = data.weight(name, rank, shrink_inputs=0.2, shrink_outputs=0.3, **settings)
    R, rho = data.gradient.shrink(0.3).R, 0.25 * float(data.drifted.G.diagonal().mean())
    assert data.error(found, mix, R, rho) == pytest.approx(data.best(rank, mix, R, rho), rel=1e-8)


def test_the_ridge_pulls_to_the_weight_itself():
    data = Streams()
    rho = 0.05 * float(data.drifted.G.diagonal().mean())
    found = data.weight("svd-llm", 4, target="anchored", ridge=0.05)
    assert data.error(found, rho=rho) == pytest.approx(data.best(4, rho=rho), rel=1e-8)
    far = data.weight("svd-llm", 4, target="anchored", ridge=1e9)
    plain = truncate(data.W).pair(data.W, 4)
    torch.testing.assert_close(far, plain[0] @ plain[1], rtol=1e-4, atol=1e-6)
    everything = data.weight("best", 4, target="anchored", shrink_inputs=1.0, shrink_outputs=1.0)
    torch.testing.assert_close(everything, plain[0] @ plain[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("two_sided", [False, True])
def test_anchored_is_never_worse_than_shifted_and_plain_in_its_own_objective(seed, two_sided):
    data = Streams(seed=10 * seed)
    name = "best" if two_sided else "svd-llm"
    settings = dict(shrink_inputs=0.0, shrink_outputs=0.0) if two_sided else {}
    R = data.gradient.R if two_sided else None
    for rank in range(1, M):
        losses = {
            target: data.error(data.weight(name, rank, target=target, ridge=0.0, **settings), R=R)
            for target in ("dense", "shifted", "mixed", "anchored")
        }
        assert losses["anchored"] <= min(losses.values()) * (1 + 1e-10)
        assert losses["mixed"] <= losses["shifted"] * (1 + 1e-10)


def test_without_drift_every_target_is_the_same():
    data = Streams(drift=0.0)
    expected = data.weight("svd-llm", 4)
    for target in recipe.TARGETS:
        torch.testing.assert_close(data.weight("svd-llm", 4, target=target, ridge=0.0), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mix,target", [(0.0, "shifted"), (1.0, "anchored")])
@pytest.mark.parametrize("name", ["aa-svd", "svd-llm"])
def test_the_ends_of_a_mix_are_shifted_and_anchored(name, mix, target):
    data = Streams()
    own = dict(anchor=mix) if name == "aa-svd" else dict(target="mixed", mix=mix)
    expected = data.weight("svd-llm", 4, target=target, ridge=0.0)
    torch.testing.assert_close(data.weight(name, 4, ridge=0.0, **own), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 5])
def test_an_adaptive_target_keeps_the_largest_share_of_its_energy(rank):
    data = Streams(drift=1.0)
    made = data.make("saes-svd", rank, ridge=0.0)
    shares = {}
    for t in MIXES:
        goal = retarget(data.W, data.cross.C, data.cross.H, t, 0.0)
        s = torch.linalg.svdvals(goal @ data.Z.T).square()
        shares[t] = float(s[:rank].sum() / s.sum())
    assert made.row["mix"] == max(shares, key=lambda t: shares[t])
    same = data.weight("svd-llm", rank, target="mixed", mix=made.row["mix"], ridge=0.0)
    torch.testing.assert_close(made.module.dense_weight(), same, rtol=1e-10, atol=1e-12)


# --- affine ---


@pytest.mark.parametrize("target", ["dense", *MIXED])
@pytest.mark.parametrize("refit", [False, True])
def test_the_bias_makes_the_mean_output_right_and_an_affine_layer_is_never_worse(target, refit):
    data = Streams(mean=2.0)
    bias = randn(M, seed=9)
    settings, mix = MIXED.get(target, ({}, 0.0))
    inputs = data.X if target == "dense" and not refit else data.Z
    wanted = (mix * data.X + (1 - mix) * inputs) @ data.W.T + bias
    losses = {}
    for affine in (False, True):
        made = data.make("svd-llm", 3, bias=bias, affine=affine, refit=refit, ridge=0.0, **settings)
        miss = wanted - made.module(inputs).detach()
        losses[affine] = float(miss.square().sum())
    torch.testing.assert_close(miss.mean(0), torch.zeros(M, dtype=torch.float64), rtol=0, atol=1e-9)
    assert losses[True] <= losses[False] * (1 + 1e-10)


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_an_affine_target_is_the_optimum_among_all_layers_with_a_bias(mix):
    data = Streams(mean=2.0)
    made = data.make("svd-llm", 3, affine=True, target="mixed", mix=mix, ridge=0.0)
    wanted = (mix * data.X + (1 - mix) * data.Z) @ data.W.T
    centred, inputs = wanted - wanted.mean(0), data.Z - data.Z.mean(0)
    Q = torch.linalg.qr(inputs).Q
    best = centred.square().sum() - torch.linalg.svdvals(Q @ (Q.T @ centred))[:3].square().sum()
    assert float((wanted - made.module(data.Z).detach()).square().sum()) == pytest.approx(float(best), rel=1e-8)


# --- refits of both factors ---


@pytest.mark.parametrize("tokens", [5, TOKENS])
@pytest.mark.parametrize("R", [None, "full", "diagonal", "singular"])
def test_every_half_step_of_the_alternation_is_exact_and_none_makes_it_worse(R, tokens):
    data = Streams(tokens)
    metric = {
        None: None,
        "full": data.gradient.R,
        "diagonal": data.gradient.R.diagonal().clone(),
        "singular": randn(M, 3, seed=7) @ randn(M, 3, seed=7).T,
    }[R]
    full = torch.eye(M, dtype=torch.float64) if metric is None else torch.diag(metric) if metric.ndim == 1 else metric
    H = data.drifted.G
    goal = retarget(data.W, data.cross.C, H, 0.5, 0.0)

    def loss(B, A):
        D = goal - B @ A
        return float(((full @ D) * (D @ H)).sum())

    A = randn(3, N, seed=3)
    before = float("inf")
    for steps in range(1, 6):
        B, new = alternate(goal, A, H, metric, steps)
        assert loss(B, new) <= before * (1 + 1e-9) + 1e-10
        before = loss(B, new)
        gradient = B.T @ full @ (goal - B @ new) @ H  # the last update was of A: stationary there
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)
    B, A = alternate(goal, A, H, metric, 300)
    optimum = float(truncate(goal, H, R=metric).loss()[3])
    assert loss(B, A) == pytest.approx(optimum, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("two_sided", [False, True])
def test_at_the_optimum_there_is_nothing_to_gain(two_sided):
    data = Streams()
    R = data.gradient.R if two_sided else None
    goal = retarget(data.W, data.cross.C, data.cross.H, 1.0, 0.0)
    B, A = truncate(goal, data.cross.H, R=R).pair(goal, 4)
    for steps in (1, 5):
        again = alternate(goal, A, data.cross.H, R, steps)
        torch.testing.assert_close(again[0] @ again[1], B @ A, rtol=1e-7, atol=1e-8)
    name, own = ("best", dict(shrink_inputs=0.0, shrink_outputs=0.0)) if two_sided else ("svd-llm", {})
    settings = dict(target="anchored", ridge=0.0, **own)
    once, more = data.weight(name, 4, **settings), data.weight(name, 4, alternations=3, **settings)
    torch.testing.assert_close(more, once, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("target", MIXED)
def test_refits_move_a_one_shot_truncation_towards_the_target(target):
    """From the truncation for dense inputs down to the optimum, never up."""
    data = Streams()
    settings, mix = MIXED[target]
    losses = [data.error(data.weight("svd-llm", 4), mix)]
    for alternations in (1, 2, 4, 300):
        made = data.weight("svd-llm", 4, start="dense", alternations=alternations, ridge=0.0, **settings)
        losses.append(data.error(made, mix))
    assert all(b <= a * (1 + 1e-10) for a, b in zip(losses, losses[1:], strict=False)) and losses[1] < 0.99 * losses[0]
    assert losses[-1] == pytest.approx(data.best(4, mix), rel=1e-5)


def test_the_refit_of_one_factor_is_half_an_alternation():
    data = Streams()
    B = data.make("svd-llm", 4, refit=True).factors.pair()[0]
    A = truncate(data.W, data.dense.G).pair(data.W, 4)[1]
    torch.testing.assert_close(B, alternate(data.W, A, data.drifted.G)[0], rtol=1e-8, atol=1e-9)


def test_mpifa_is_its_algorithm_box():
    """Truncation on dense inputs, B and A in turn towards the mixed output, the pull of A towards W as in the objective."""
    data = Streams()
    _, A = truncate(data.W, data.dense.G).pair(data.W, 4)
    rho = 1e-3 * float(data.drifted.G.diagonal().mean())
    H = data.drifted.G + rho * torch.eye(N, dtype=torch.float64)
    T = data.W @ (0.25 * data.cross.C + 0.75 * data.drifted.G) + rho * data.W
    for _ in range(2):
        B = T @ A.T @ torch.linalg.inv(A @ H @ A.T)
        A = torch.linalg.pinv(B) @ T @ torch.linalg.inv(H)
    made = data.make("mpifa", 4, alternations=2)
    torch.testing.assert_close(made.module.dense_weight(), B @ A, rtol=1e-7, atol=1e-8)
    assert made.factors.kind == "row_pivoted" and made.factors.numel == 4 * (M + N - 4) + 4


def test_adasvd_is_its_algorithm_box():
    data = Streams()
    _, A = truncate(data.W, data.dense.G).pair(data.W, 4)
    for _ in range(3):
        B = data.W @ data.drifted.G @ A.T @ torch.linalg.inv(A @ data.drifted.G @ A.T)
        A = torch.linalg.pinv(B) @ data.W
    found = data.weight("adasvd", 4, alternations=3)
    torch.testing.assert_close(found, B @ A, rtol=1e-7, atol=1e-8)


# --- the whole way, through a model ---


def inputs_of(model, names, ids):
    seen = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _m, args, n=n: seen.__setitem__(n, args[0].detach()))
        for n in names
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {n: x.flatten(0, 1) for n, x in seen.items()}


WHOLE = {
    "two-sided and anchored": dict(method="best", target="anchored", shrink_inputs=0.0, ridge=0.0),
    "two-sided and shifted": dict(method="best", target="shifted", shrink_inputs=0.0),
    "mixed": dict(method="svd-llm", target="mixed", mix=0.3, ridge=0.0),
    "aa-svd": dict(method="aa-svd", ridge=0.0, allocate="lagrange"),
    "refitted": dict(method="mpifa", alternations=100, ridge=0.0, multiple=1),
}


@pytest.mark.parametrize("run", WHOLE)
def test_every_layer_of_a_compressed_model_is_the_optimum_on_the_inputs_that_it_sees(run):
    """All that lies in front of a layer is final when it is made: the finished model shows it the same inputs."""
    settings = dict(WHOLE[run])
    method = settings.pop("method")
    made = recipe.get(method).recipe(**settings)
    model, dense = tiny("qwen2-bias", dtype=torch.float64), tiny("qwen2-bias", dtype=torch.float64)
    corank.compress(model, method, keep=0.6, tokenizer=tokenizer(), **settings, **DATA)
    data = calibration(tokenizer(), TEXT, 6, 16, 0)
    names = [n for n, m in model.named_modules() if hasattr(m, "dense_weight")]
    assert len(names) > 12
    seen, wanted = inputs_of(model, names, data.ids), inputs_of(dense, names, data.ids)
    metrics: dict[str, Tensor] = {}
    if "gradient" in made.statistics:
        source = ResidentModel(tiny("qwen2-bias", dtype=torch.float64))

        def keep(_layer, _part, table):
            metrics.update({n: s["gradient"].result().shrink(0.03).R for n, s in table.items()})

        sweep(source, data, 4, source.outline.sites, ["gradient"], lambda *_: None, keep)
    mix = {"shifted": 0.0, "anchored": 1.0, "mixed": made.mix}[made.target]
    for name in names:
        Z, X, W = seen[name], wanted[name], weight_of(dense.get_submodule(name))
        L = torch.linalg.cholesky(metrics[name]).T if metrics else torch.eye(len(W), dtype=torch.float64)
        T = (mix * X + (1 - mix) * Z) @ W.T @ L.T
        U, s, _ = torch.linalg.svd(Z, full_matrices=False)
        U = U[:, s > 1e-9 * s[0]]
        layer = model.get_submodule(name)
        best = T.square().sum() - torch.linalg.svdvals(U @ (U.T @ T))[: layer.rank].square().sum()
        found = (T - Z @ layer.dense_weight().T @ L.T).square().sum()
        assert float(found) == pytest.approx(float(best), rel=2e-3 if run == "refitted" else 1e-6, abs=1e-9), name


@pytest.mark.parametrize("method,settings", [("mpifa", {}), ("best", dict(target="anchored")), ("saes-svd", {})])
def test_streamed_from_disk_and_in_memory_are_the_same_bits(method, settings, tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    corank.compress(folder, method, keep=0.7, out=tmp_path / "streamed", **settings, **DATA)
    model = tiny("llama-gqa")
    corank.compress(model, method, keep=0.7, tokenizer=tokenizer(), **settings, **DATA)
    streamed = dict(corank.load(tmp_path / "streamed")[0].state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(streamed[name], value), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(mix=1.5, target="mixed"), "mix must be between 0 and 1"),
        (dict(ridge=-1.0), "must not be negative"),
        (dict(ridge=float("nan")), "must not be negative"),
        (dict(alternations=-1), "must not be negative"),
        (dict(target="anchord"), "anchored"),
        (dict(start="dens"), "dense"),
        (dict(start="dense", target="mixed"), "alternations=1"),
        (dict(labels="top"), "top5"),
        (dict(labels="top1"), "top2"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(settings, words):
    with pytest.raises(CorankError, match=words):
        recipe.get("svd-llm").recipe(**settings)
    with pytest.raises(CorankError, match="two free factors"):
        recipe.get("col-id").recipe(alternations=2)
    with pytest.raises(CorankError, match="at least 1"):
        alternate(randn(4, 5), randn(2, 5), torch.eye(5).double(), steps=0)
