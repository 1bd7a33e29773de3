"""Every way to heal, on a model with factors of every kind: what it may change, what it never does, and going on."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from corank.errors import CorankError
from corank.factors import FactorizedLinear, SharedLowRankLinear, replace
from corank.heal import Schedule, list_ways, train
from corank.heal.parameters import WHAT, of_block, trainable
from corank.heal.way import Case, what_of
from corank.model import ResidentModel
from factorized import across, compressed, factors_of, mixed, tied_in_factors
from tiny import tiny, windows

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WAYS = sorted(list_ways())


def small(how):
    """What is healed: factors of every kind, one of them a link; or links wherever links alone train."""
    return compressed("cur", layers=2, ranks=(6,)) if how == "curing" else mixed()


def dense(layers=2, name="llama-gqa"):
    model = tiny(name)
    del next(m for m in model.modules() if isinstance(m, nn.ModuleList))[layers:]
    model.config.num_hidden_layers = layers
    return model


def healed(model, how, teacher=None, data=None, epochs=2.0, **rest):
    teacher, data = teacher or dense(), data or windows(20, seed=3)
    schedule = Schedule(epochs=epochs, learning_rate=1e-3)
    return train(ResidentModel(model), ResidentModel(teacher), data, how, schedule=schedule, **rest)


def state(model):
    return {n: p.detach().clone() for n, p in model.state_dict().items()}


def declared(model, how, teacher=None):
    both = ResidentModel(model), ResidentModel(teacher or dense())
    return set(list_ways()[how].parameters(Case(*both, windows(), [], [], what_of(how, None), Schedule())))


@pytest.mark.parametrize("how", WAYS)
def test_only_what_is_declared_changes_and_nothing_gets_worse(how, tmp_path):
    model = small(how)
    before, flags = state(model), {n: p.requires_grad for n, p in model.named_parameters()}
    result = healed(model, how)
    after = state(model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and changed <= declared(model, how)
    assert result.after < result.before == pytest.approx(result.curve[0][1])
    assert min(value for _, value in result.curve) == pytest.approx(result.after, rel=1e-4)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags  # and the model is what it was
    sizes = [before[n].shape for n in declared(model, how)]
    assert result.trained == sum(8 * sum(s) if "lora" in how else s.numel() for s in sizes)

    # what was measured is what there is: without training, the loss of the result is that of the result
    again = healed(model, how, epochs=0) if how != "closed-form" else None
    if again is not None and not list_ways()[how].by_blocks:
        assert [again.before, again.after] == pytest.approx([result.after] * 2, rel=1e-4)

    # interrupted and gone on with: the same seed, and the same bits
    class Stopped(Exception):
        pass

    seen = []

    def stop(what, done, of, value):
        seen.append(what)
        if what not in ("teacher",) and len([w for w in seen if w != "teacher"]) > (
            1 if list_ways()[how].by_blocks else 12
        ):
            raise Stopped

    other = small(how)
    with pytest.raises(Stopped):
        healed(other, how, work=tmp_path, progress=stop)
    other = small(how)
    second = healed(other, how, work=tmp_path)
    assert all(torch.equal(p, after[n]) for n, p in state(other).items())
    assert second.after == result.after and second.history[-1]["heldout"] == result.history[-1]["heldout"]


@pytest.mark.parametrize("how", [w for w in WAYS if w != "closed-form"])
def test_no_steps_are_the_identity(how):
    model = mixed()
    before = state(model)
    result = healed(model, how, epochs=0)
    assert all(torch.equal(p, before[n]) for n, p in state(model).items())
    assert result.before == pytest.approx(result.after, rel=1e-6)


@pytest.mark.parametrize("how", WAYS)
def test_sixteen_bit_models_learn_from_teachers_in_full_precision(how):
    model = small(how).bfloat16()
    before = state(model)
    result = healed(model, how, epochs=1)
    after = state(model)
    assert result.after <= result.before and {p.dtype for p in after.values()} == {p.dtype for p in before.values()}
    assert how == "curing" or any(not torch.equal(p, before[n]) for n, p in after.items())


@pytest.mark.parametrize("how", [w for w in WAYS if list_ways()[w].by_blocks])
def test_a_basis_that_other_blocks_read_is_one_blocks_to_move_in_no_local_way(how):
    model = across()
    owner = model.model.layers[0].self_attn.q_proj
    basis = owner.down.weight.detach().clone()
    healed(model, how, tiny("llama-gqa"))
    assert torch.equal(owner.down.weight, basis)


@pytest.mark.parametrize("how", ["kd", "lrc-only", "alternate"])
def test_a_basis_that_other_blocks_read_is_trained_once_with_the_whole_model(how):
    model = across()
    owner = model.model.layers[0].self_attn.q_proj
    basis = owner.down.weight.detach().clone()
    healed(model, how, tiny("llama-gqa"), what="matrices")
    assert not torch.equal(owner.down.weight, basis)
    names = declared(model, how, tiny("llama-gqa"))
    assert sum(n.endswith("q_proj.down.weight") for n in names) == 1


def test_what_may_train():
    model = mixed()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    found = {what: set(trainable(model, what)) for what in WHAT}
    assert found["links"] < found["matrices"] <= found["layers"] < found["factors"] < found["blocks"]
    for name, p in model.named_parameters():
        owner = next((n for n in layers if name.startswith(f"{n}.")), None)
        frozen = owner is not None and layers[owner].kind == "cur" and ".link." not in name and p.dim() > 1
        assert (name in found["blocks"]) is not frozen
        assert (name in found["matrices"]) is (owner is not None and p.dim() > 1 and not frozen)
        assert (name in found["factors"]) is (not frozen and (owner is not None or p.dim() == 1))
        assert (name in found["links"]) is (".link." in name)


def test_a_basis_that_only_its_own_block_reads_is_the_blocks():
    model = mixed()  # q, k and v of the first block share one
    follower = next(n for n, m in model.named_modules() if isinstance(m, SharedLowRankLinear))
    assert follower.startswith("model.layers.0.")
    assert "self_attn.q_proj.down.weight" in of_block(model, "model.layers.0", "factors")


def test_factors_outside_the_blocks_learn_with_the_whole_model():
    model = tied_in_factors()
    before = state(model)
    assert healed(model, "kd", tiny("llama-tied")).after < 1
    assert not torch.equal(model.lm_head.down.weight, before["lm_head.down.weight"])
    model = tied_in_factors()
    with pytest.raises(CorankError, match="nothing that block trains"):
        healed(model, "block", tiny("llama-tied"), what="matrices")


def test_the_teacher_of_kd_needs_the_same_tokens_alone():
    model = dense(1)
    result = healed(model, "kd", tiny("gpt2-conv1d"), windows(40, seed=3))
    assert result.after < result.before
    for how in ("block", "closed-form", "curing"):
        with pytest.raises(CorankError, match=r"how=kd|nothing that"):
            healed(compressed("cur", ranks=(6,)), how, tiny("gpt2-conv1d"))


def test_models_that_do_not_run_block_by_block_learn_from_predictions_alone():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=24, d_kv=6, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0)
    teacher = tf.T5ForConditionalGeneration(tf.T5Config(**sizes)).eval()
    model = copy.deepcopy(teacher)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            replace(model, name, factors_of("low_rank", layer.weight.detach(), 4).module())
    for how in ("kd", "lrc-only"):
        data = windows(20, seed=3, padded=how == "kd")
        result = healed(copy.deepcopy(model), how, teacher, data)
        assert result.after < result.before
    with pytest.raises(CorankError, match="block by block"):
        healed(model, "block", teacher)


@pytest.mark.parametrize(
    ("how", "what", "words"),
    [("local", "blocks", "layers or matrices"), ("kd", "parts", "factors"), ("lcr-only", None, "lrc-only")],
)
def test_a_choice_that_a_way_does_not_have_is_refused(how, what, words):
    with pytest.raises(CorankError, match=words):
        healed(mixed(), how, what=what)


def test_a_model_without_links_has_nothing_for_curing():
    with pytest.raises(CorankError, match="nothing that curing trains"):
        healed(compressed("low_rank", layers=2), "curing")
    model = compressed("low_rank", layers=2)
    assert healed(model, "curing", what="factors").trained > 0


def test_teachers_with_other_tokens_are_refused():
    model = tiny("llama-gqa")
    model.config.vocab_size = 65
    with pytest.raises(CorankError, match="65 tokens and the teacher 64"):
        healed(model, "kd")


def test_adapters_are_merged_exactly():
    result = healed(mixed(), "lora", what="blocks")
    *adapted, merged = result.history[0]["heldout"]
    assert merged == pytest.approx(min(adapted), rel=1e-5) and merged < adapted[0]
    assert result.after == merged
