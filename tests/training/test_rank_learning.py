"""Learning and compression in turns: exact truncations, a penalty that wins in the end, ranks within the budget."""

from __future__ import annotations

import pytest
import torch

import corank
from corank.errors import CorankError
from corank.model import Text
from corank.recipe import get
from corank.training.rank_learning import RankLearning, Turns
from tiny import saved, text, tiny, tokenizer

DATA = dict(data=Text(text(), "words"), samples=6, length=16, batch=4)


class Case:
    """As much of a job as the turns look at."""

    def __init__(self, model):
        from corank.model import ResidentModel

        self.source = ResidentModel(model)
        self.recipe = get("lc-rank").recipe(learn=True)
        self.sites = [s for s in self.source.outline.sites if s.form == "linear"]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d"])
def test_the_c_step_truncates_at_one_price(name):
    case = Case(tiny(name, dtype=torch.float64))
    dense = sum(s.numel for s in case.sites)
    turns = Turns(case, case.sites, int(0.6 * dense), RankLearning(pull=0.25))
    turns.begin(3.0)
    stored, marginal = 0, []
    for site in case.sites:
        W = turns.weights[site.name].detach()
        W, Theta = (x.mT if name.startswith("gpt2") else x for x in (W, turns.targets[site.name]))
        U, s, Vt = torch.linalg.svd(W, full_matrices=False)
        rank = turns.ranks[site.name]
        assert torch.allclose(Theta, (U[:, :rank] * s[:rank]) @ Vt[:rank], atol=1e-9)
        stored += site.numel if rank is None else rank * sum(site.shape)
        if rank is not None and 0 < rank:
            marginal.append((float(s[rank - 1] ** 2) / sum(site.shape), float(s[rank] ** 2) / sum(site.shape)))
    assert stored <= 0.6 * dense
    # what the last component of a matrix is worth is about the price that the next one of any other would not be
    paid, refused = min(last for last, _ in marginal), max(following for _, following in marginal)
    assert refused <= paid * 1.5
    assert float(turns.penalty().detach()) == pytest.approx(0.25 * 3.0, rel=1e-9)


def test_the_penalty_pulls_the_weights_to_the_truncations(tmp_path):
    """With next to no loss left to learn from, W ends close to Theta; the weights that are handed on have the ranks."""
    model = tiny("llama-gqa", dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = dict(keep=0.6, learn=True, rate=2e-2, growth=2.0, steps=24)
    report = corank.compress(model, "lc-rank", tokenizer=tokenizer(), out=tmp_path / "out", **settings, **DATA)
    sites = report.accounting["sites"]
    assert 0.5 * sites["dense"] < sites["compressed"] <= 0.6 * sites["dense"]
    low = [row for row in report.sites if row["kind"] == "low_rank"]
    assert low and all(row["loss"] < 1e-6 for row in low)  # trained matrices have these ranks exactly
    loaded, _ = corank.load(tmp_path / "out", dtype=torch.float64)
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)
    moved = sum(
        float((model.get_submodule(r["name"]).dense_weight() - before[r["name"] + ".weight"]).norm()) for r in low
    )
    assert moved > 0


def test_learning_makes_the_truncation_cheaper():
    """The distance between weights and their truncations falls from turn to turn."""
    case = Case(tiny("llama-gqa", dtype=torch.float64))
    dense = sum(s.numel for s in case.sites)
    turns = Turns(case, case.sites, int(0.6 * dense), RankLearning(pull=1.0, turn=1))
    turns.begin(1.0)
    distances = []
    for step in range(4):
        with torch.no_grad():
            for name, weight in turns.weights.items():  # an L step without a loss, halfway to its optimum
                weight.copy_((weight + turns.targets[name]) / 2)
        distances.append(float(turns.penalty().detach()) / turns.mu)
        turns.after(step, turns.weights)
    assert all(b < 0.3 * a for a, b in zip(distances[:-1], distances[1:], strict=True))
    state = turns.state()
    other = Turns(case, case.sites, int(0.6 * dense), RankLearning())
    other.restore(state)
    assert other.mu == turns.mu == pytest.approx(state["mu"]) and float(other.penalty().detach()) == float(
        turns.penalty().detach()
    )
    ranks = turns.finish()
    for name, rank in ranks.items():
        assert torch.linalg.matrix_rank(turns.weights[name], rtol=1e-9) <= rank


def test_from_a_directory_and_bad_input(tmp_path):
    folder = saved("qwen2-bias", tmp_path / "dense")
    corank.compress(folder, "lc-rank", keep=0.7, learn=True, steps=4, out=tmp_path / "out", **DATA)
    corank.verify(tmp_path / "out")
    assert not (tmp_path / "out.training").exists()
    for settings, match in (({"growth": 0.5}, "below 1"), ({"rate": 0.0}, "positive"), ({"metric": "odd"}, "metric")):
        with pytest.raises(CorankError, match=match):
            corank.compress(
                tiny("llama-gqa"), "lc-rank", keep=0.7, learn="odd" not in settings.values(), **settings, **DATA
            )
    model = tiny("llama-gqa")
    report = corank.compress(model, "lc-rank", keep=1.0, learn=True, tokenizer=tokenizer(), **DATA)
    assert {row["kind"] for row in report.sites} == {"dense"}
