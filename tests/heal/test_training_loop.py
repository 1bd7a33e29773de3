"""The training loop: the same steps however they are cut up, and an orderly end whatever happens."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from corank.engine.world import Interrupted
from corank.errors import CorankError
from corank.heal import Schedule, train
from corank.heal.training import fit
from corank.model import ResidentModel
from factorized import mixed
from tiny import tiny, windows


def dense():
    """What `mixed` was made from."""
    model = tiny("llama-gqa")
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return model


def problem(dtype=torch.float64):
    """Least squares with one row per sequence: parameters, loss."""
    g = torch.Generator().manual_seed(0)
    X, y = (torch.randn(12, *s, generator=g, dtype=torch.float64).to(dtype) for s in ((3,), ()))
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    return {"p": p}, lambda which: (X[list(which)] @ p - y[list(which)]).square().mean()


def fitted(dtype=torch.float64, loss=None, state=None, **settings):
    parameters, own = problem(dtype)
    schedule = Schedule(**{"epochs": 5, "learning_rate": 0.02, **settings})
    history = fit(parameters, loss(parameters, own) if loss else own, list(range(10)), [10, 11], schedule, state=state)
    return parameters["p"].detach().clone(), history


@pytest.mark.parametrize(("batch", "accumulate"), [(2, 2), (1, 4), (3, 1)])
def test_a_step_is_the_same_however_many_passes_it_takes(batch, accumulate):
    whole = 4 if batch != 3 else 3  # 10 sequences: the last step of an epoch is a smaller one
    (one, first), (other, second) = fitted(batch=whole), fitted(batch=batch, accumulate=accumulate)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert first.steps == second.steps and first.heldout == pytest.approx(second.heldout, rel=1e-12)


def test_parts_of_a_step_count_by_what_their_loss_is_a_mean_over():
    def run(batch, accumulate):
        g = torch.Generator().manual_seed(1)
        lengths = [1, 5, 2, 7, 3, 4, 6, 2, 9, 1]
        rows = [torch.randn(n, 3, generator=g, dtype=torch.float64) for n in lengths]
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def loss(which):
            return (torch.cat([rows[i] for i in which]) @ p - 1).square().mean()

        schedule = Schedule(epochs=3, learning_rate=0.02, batch=batch, accumulate=accumulate)
        weight = lambda which: sum(lengths[i] for i in which)  # noqa: E731
        return fit({"p": p}, loss, list(range(8)), [8, 9], schedule, weight=weight).heldout

    assert run(4, 1) == pytest.approx(run(1, 4), rel=1e-12)


def test_double_precision_is_trained_in_double_precision():
    result, _ = fitted()
    assert not torch.equal(result, result.float().double())


def test_half_precision_gathers_steps_that_are_smaller_than_its_own():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    spacing = 2.0**-8  # of bfloat16 below one
    schedule = Schedule(epochs=40, learning_rate=spacing / 20, batch=1)
    history = fit({"p": p}, lambda which: (p.float() - 0.5).square().mean(), [0, 1, 2, 3], [4], schedule)
    assert history.best < history.heldout[0] and float(p.detach().max()) <= 1 - 4 * spacing


def bad_at(step, value):
    """The loss, but for one step."""

    def make(parameters, loss):
        calls = []

        def spoilt(which):
            if torch.is_grad_enabled():
                calls.append(which)
                if len(calls) == step:
                    return loss(which) * value
            return loss(which)

        return spoilt

    return make


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training_with_the_best_state(value):
    before, _ = fitted(epochs=5, batch=10)
    result, history = fitted(loss=bad_at(4, value), batch=10)
    assert history.ended == "the loss was not finite at step 4 of 5"
    assert history.steps == [0, 1, 2, 3] and all(map(math.isfinite, history.heldout))
    parameters, loss = problem()
    with torch.no_grad():
        parameters["p"].copy_(result)
        assert float(loss([10, 11])) == pytest.approx(history.best)
    assert not torch.equal(before, result)


def test_a_gradient_that_is_not_finite_is_not_followed():
    def rooted(parameters, loss):  # the root has no finite slope at the start
        return lambda which: loss(which) + parameters["p"].abs().sqrt().sum()

    result, history = fitted(loss=rooted)
    assert history.ended == "the gradient was not finite at step 1 of 25" and float(result.abs().max()) == 0


def test_held_out_losses_that_are_not_finite_are_never_kept():
    def broken(parameters, loss):
        def value(which):
            bad = not torch.is_grad_enabled() and float(parameters["p"].detach().abs().max()) > 0.05
            return loss(which) * (math.nan if bad else 1.0)

        return value

    result, history = fitted(loss=broken)
    assert history.ended.startswith("the loss on held-out sequences was not finite after step")
    assert math.isfinite(history.best) and float(result.abs().max()) <= 0.05


def test_a_note_says_where_training_ended(monkeypatch):
    from corank.heal import distillation

    real, calls = distillation.Predictions.divergence, []

    def spoilt(self, logits, which):
        calls.append(torch.is_grad_enabled())
        return real(self, logits, which) * (math.nan if sum(calls) == 3 else 1.0)

    monkeypatch.setattr(distillation.Predictions, "divergence", spoilt)
    teacher = dense()
    model, schedule = mixed(), Schedule(learning_rate=1e-3)
    result = train(ResidentModel(model), ResidentModel(teacher), windows(12), "kd", schedule=schedule)
    assert result.notes == ["training: the loss was not finite at step 3 of 12; the best state until then was kept."]
    assert result.after <= result.before and all(torch.isfinite(p).all() for p in model.parameters())


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    whole, expected = fitted(batch=2)
    state = tmp_path / "state.pt"
    real, calls = torch.save, []

    def full(document, file):
        calls.append(file)
        if len(calls) == 3:
            Path(file).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(document, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Interrupted, match="Free some space and run the same command again"):
        fitted(batch=2, state=state)
    assert [f.name for f in tmp_path.iterdir()] == ["state.pt"]
    assert torch.load(state, weights_only=True)["step"] == 4  # two looks per epoch of five steps
    monkeypatch.undo()
    result, history = fitted(batch=2, state=state)
    assert torch.equal(result, whole) and history.heldout == expected.heldout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_really_full(tmp_path):
    (tmp_path / "state.pt.partial").symlink_to("/dev/full")
    with pytest.raises(Interrupted, match="disk is full"):
        fitted(state=tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_best_state(tmp_path):
    def failing(parameters, loss):
        calls = []

        def value(which):
            calls.append(which)
            if len(calls) == 20:
                raise RuntimeError("out of memory")
            return loss(which)

        return value

    parameters, own = problem()
    schedule = Schedule(epochs=5, learning_rate=0.02, checks=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(parameters, failing(parameters, own), list(range(10)), [10, 11], schedule)
    kept = parameters["p"].detach().clone()
    after_epochs = [fitted(epochs=5, checks=1, loss=stop_after(n))[0] for n in (10, 15)]
    assert any(torch.equal(kept, p) for p in after_epochs)


def stop_after(steps):
    """A loss that ends the training, in good order, behind so many steps."""
    return bad_at(steps + 1, math.nan)


def test_sixteen_bit_products_train_and_leave_the_weights_as_precise_as_they_were():
    teacher = dense()
    results = {}
    for precision in ("float32", "bfloat16", "auto"):
        model, schedule = mixed(), Schedule(learning_rate=1e-3, precision=precision)
        healed = train(ResidentModel(model), ResidentModel(teacher), windows(20), "kd", schedule=schedule)
        assert healed.after < healed.before and {p.dtype for p in model.parameters()} == {torch.float32}
        results[precision] = healed.history[0]["heldout"]
    assert results["auto"] == results["float32"] != results["bfloat16"]  # on the CPU
    assert results["bfloat16"] == pytest.approx(results["float32"], rel=0.05)


def test_an_unknown_precision_is_refused():
    with pytest.raises(CorankError, match="bfloat16"):
        Schedule(precision="bfloat8")
