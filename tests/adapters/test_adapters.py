"""What every adapter method must hold, on every storage of a linear map."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from adapter_cases import ARCHITECTURES, CASES, STARTED, attached, disturb, expected_count, read_back

from corank import adapters
from corank.errors import CorankError
from corank.factors import shape_of
from factorized import IDS, linears, logits, loss
from processes import start
from tiny import GQA, SIZES, tiny

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
EXACT = dict(rtol=0, atol=1e-12)


def dense64(name):
    return tiny(name, dtype=torch.float64)


def learn(model, steps=3):
    """Some steps of Adam on fixed tokens."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_only_the_adapter_trains_and_it_merges_exactly(case, name):
    dense = dense64(name)
    shapes = {n: shape_of(layer) for n, layer in linears(dense).items()}
    bare = logits(dense)
    model = attached(dense, case)
    assert adapters.trainable(model) == expected_count(case, shapes, {})
    torch.testing.assert_close(logits(model), bare, **EXACT)

    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    before, begun = {n: v.clone() for n, v in model.state_dict().items()}, loss(model).item()
    learn(model)
    assert loss(model).item() < begun
    after = model.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before.keys() - trains)
    assert trains and all(not torch.equal(after[n], before[n]) for n in trains)  # every single one moved

    disturb(model)
    trained, state = logits(model), {n: v.clone() for n, v in model.state_dict().items()}
    assert float((trained - bare).abs().max()) > 1e-2
    with model.disable_adapter():
        if case not in STARTED:
            torch.testing.assert_close(logits(model), bare, **EXACT)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), trained, **EXACT)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), trained, **EXACT)
    if case not in STARTED:  # PEFT subtracts what it added to LoRA's weights, which rounds
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, **EXACT)
    assert {type(layer) for layer in linears(merged).values()} == {
        type(layer) for layer in linears(dense64(name)).values()
    }
    assert not any("corank" in n or "lora" in n for n in merged.state_dict())


def test_adapters_are_loaded_by_peft_in_another_process(tmp_path):
    places, expected = {}, {}
    for case in CASES:
        name = "gpt2-conv1d" if case in ("curing", "corda") else "llama-gqa"
        model = attached(dense64(name), case)
        disturb(model)
        label = f"{name}/{case}"
        expected[label] = logits(model)
        places[label] = str(adapters.save(model, tmp_path / label.replace("/", "-")))
    process = start(read_back, places, torch.float64, str(tmp_path / "logits.pt"))
    process.join(600)
    assert process.exitcode == 0
    found = torch.load(tmp_path / "logits.pt")
    for label, wanted in expected.items():
        if label.split("/")[1] in STARTED:  # converted: what was taken out of W is back in it, up to rounding
            torch.testing.assert_close(found[label], wanted, **EXACT)
        else:
            assert torch.equal(found[label], wanted), label


def test_saved_adapters_hold_the_core_and_the_indices_alone(tmp_path):
    from safetensors.torch import load_file

    model = attached(dense64("llama-gqa"), "curing", targets=["q"])
    model.save_pretrained(tmp_path)  # what PEFT writes by itself is as good
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 3 * 3
    assert {tuple(v.shape) for k, v in state.items() if k.endswith("core")} == {(5, 5)}
    assert {tuple(v.shape) for k, v in state.items() if not k.endswith("core")} == {(5,)}


@pytest.mark.parametrize("case", [c for c in CASES if not c.endswith(("minor", "role", "data"))])
def test_bfloat16(case, tmp_path):
    dense = tiny("llama-gqa", dtype=torch.bfloat16)
    bare = logits(dense)
    model = attached(dense, case)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    # what is left of W after a part is taken out is rounded to 16 bits again
    torch.testing.assert_close(logits(model), bare, rtol=0, atol=0.2 if case in STARTED else 0)
    learn(model)
    trained = logits(model)
    again = adapters.load(tiny("llama-gqa", dtype=torch.bfloat16), adapters.save(model, tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=0.2 if case in STARTED else 0)
    torch.testing.assert_close(logits(model.merge_and_unload()), trained, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("case", ["curing", "tcurlora", "mora"])
def test_copies_go_their_own_way(case):
    model = attached(dense64("llama-gqa"), case)
    disturb(model)
    trained = logits(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert torch.equal(logits(twin), trained)
        disturb(twin, 0.5)
        assert not torch.equal(logits(twin), trained) and torch.equal(logits(model), trained)


def test_several_adapters_on_one_model(tmp_path):
    model = attached(dense64("llama-gqa"), "curing")
    bare = logits(model)
    disturb(model)
    one = logits(model)
    adapters.save(model, tmp_path / "one")
    model.load_adapter(tmp_path / "one", "two")
    model.set_adapter("two")
    assert torch.equal(logits(model), one)
    model.base_model.set_adapter(["default", "two"])
    both = logits(model)
    assert not torch.equal(both, one)
    model.merge_adapter(["default"])
    model.merge_adapter(["two"])  # on top, and from the weights as they were
    torch.testing.assert_close(logits(model), both, **EXACT)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.equal(logits(model), one)
    assert torch.equal(logits(model.unload()), bare)


def test_tied_states_survive_low_memory_loading(tmp_path):
    model = attached(dense64("llama-gqa"), "tcurlora")
    disturb(model)
    place = adapters.save(model, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(dense64("llama-gqa"), place, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("case", ["curing", "curlora", "tcurlora", "corda"])
def test_the_same_seed_gives_the_same_adapter(case):
    def state(seed):
        model = attached(dense64("llama-gqa"), case, seed=seed)
        return {n: v for n, v in model.state_dict().items() if "corank" in n or "lora" in n}

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(v, again[n]) for n, v in first.items())
    assert (case == "curlora") is any(not torch.equal(v, other[n]) for n, v in first.items())


def test_a_choice_does_not_depend_on_which_other_layers_are_adapted():
    few = attached(dense64("llama-gqa"), "curlora", targets=["v"]).state_dict()
    many = attached(dense64("llama-gqa"), "curlora").state_dict()
    chosen = [n for n in few if "corank_rows" in n]
    assert chosen and all(torch.equal(few[n], many[n]) for n in chosen)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(training):
    dense = dense64("llama-gqa").train(training)
    weights = {n: v.clone() for n, v in dense.state_dict().items()}
    model = attached(dense, "curing-data")
    assert dense.training is training
    assert all(torch.equal(v, model.get_base_model().state_dict()[key_in(n)]) for n, v in weights.items())


def key_in(name):
    """The name of a weight after its layer has been wrapped."""
    head, _, last = name.rpartition(".")
    return f"{head}.base_layer.{last}" if head.endswith("_proj") else name


def test_ranks_by_role_and_the_budget_they_make(tmp_path):
    model = attached(dense64("llama-gqa"), "curing", targets=["q", "k", "gate"], ranks={"q": 7, "*0*k_proj": 2})
    assert adapters.trainable(model) == 3 * 7**2 + 2**2 + 2 * 5**2 + 3 * 5**2
    disturb(model)
    again = adapters.load(dense64("llama-gqa"), adapters.save(model, tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))
    lora = attached(dense64("llama-gqa"), "pissa", targets=["q", "k"], ranks={"k": 5})
    assert adapters.trainable(lora) == 3 * (3 * 48 + 5 * 36)
    disturb(lora)
    again = adapters.load(dense64("llama-gqa"), adapters.save(lora, tmp_path / "lora"))
    torch.testing.assert_close(logits(again), logits(lora), **EXACT)
    stacks = attached(dense64("llama-gqa"), "tcurlora", targets=["q", "o"], ranks={"o": 3})
    assert adapters.trainable(stacks) == 3 * 2**2 + 3 * 3**2  # ranks that differ make stacks of their own


def test_converted_adapters_are_ordinary_lora_of_twice_the_rank(tmp_path):
    model = attached(tiny("llama-gqa"), "pissa", ranks={"k": 2})
    disturb(model)
    place = adapters.save(model, tmp_path / "adapter")
    config = json.loads((place / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["init_lora_weights"]) == ("LORA", 6, 6, True)
    again = peft.PeftModel.from_pretrained(tiny("llama-gqa"), place)
    weights = {n: layer.weight for n, layer in linears(tiny("llama-gqa")).items()}
    for name, W in weights.items():
        layer = again.get_base_model().get_submodule(name)
        assert torch.equal(layer.base_layer.weight, W)  # the weights are as they were
        assert layer.r["default"] == (4 if "k_proj" in name else 6) and layer.scaling["default"] == 1.0


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d"])
def test_pissa_is_that_of_peft(name):
    ours = attached(tiny(name), "pissa").get_base_model()
    names = list(linears(tiny(name)))
    config = peft.LoraConfig(r=3, lora_alpha=3, init_lora_weights="pissa", target_modules=names)
    theirs = peft.get_peft_model(tiny(name), config).get_base_model()
    for place in names:
        a, b = (model.get_submodule(place) for model in (ours, theirs))
        torch.testing.assert_close(a.base_layer.weight, b.base_layer.weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(a.get_delta_weight("default"), b.get_delta_weight("default"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["curing", "tcurlora", "corda"])
def test_a_classifier_trains_as_a_whole_beside_the_adapter(case, tmp_path):
    def bert():
        torch.manual_seed(0)
        sizes = dict(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
        return (
            transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).double().eval()
        )

    model = attached(bert(), case, modules_to_save=["classifier"], task_type="SEQ_CLS")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trains if "corank_" not in n and "lora_" not in n} == {
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    disturb(model)
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        again = peft.PeftModel.from_pretrained(bert(), adapters.save(model, tmp_path / "adapter")).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, trained, **EXACT)
        torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, trained, **EXACT)


def test_wrong_input_says_what_to_do_and_changes_nothing(tmp_path, monkeypatch):
    def fails(message, method="curing", **settings):
        model = tiny("llama-gqa")
        shape = str(model)
        with pytest.raises(CorankError, match=message):
            adapters.attach(model, method, **settings)
        assert str(model) == shape

    fails(r"rank of 13 is larger than model.layers.0.self_attn.k_proj \[12, 24\].*at most 12", rank=13)
    fails("Unknown role or site 'gat'; nearest: gate", rank=4, targets=["gat"])
    fails("Unknown role or site 'z'", rank=4, ranks={"z": 4})
    fails("Unknown adapter 'curlra'; nearest: curlora", "curlra")
    fails("Unknown setting of 'curing' 'rnk'; nearest: rank", rnk=4)
    fails("Unknown selector 'diem'; nearest: deim", selector="diem")
    fails("at least 1, got 0; at 0 nothing would train", rank=0)
    fails("at least 1, got 0 for 'q'", rank=4, ranks={"q": 0})
    fails("give data=TEXT", "corda", rank=2)
    fails("Give tokenizer", "corda", rank=2, data="builtin")
    fails("Unknown kind of components 'main'", "pissa", rank=2, components="main")
    fails("Unknown module to save 'lm_hed'; nearest: lm_head", rank=4, modules_to_save=["lm_hed"])
    fails("floor must be positive", "curlora", floor=0.0)
    fails("Unknown grouping 'layer'", "tcurlora", grouping="layer")
    with pytest.raises(CorankError, match="has adapters already"):
        adapters.attach(attached(tiny("llama-gqa"), "curing"), "curing", rank=4)
    with pytest.raises(CorankError, match="no linear layers"):
        adapters.attach(torch.nn.Sequential(torch.nn.ReLU()), "curing", rank=4)
    with pytest.raises(CorankError, match="holds no adapter"):
        adapters.load(tiny("llama-gqa"), tmp_path)
    with pytest.raises(CorankError, match="no adapters to save"):
        adapters.save(tiny("llama-gqa"), tmp_path / "a")
    model = attached(tiny("llama-gqa"), "curing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CorankError, match="not an empty directory"):
        adapters.save(model, tmp_path / "full")
    with pytest.raises(CorankError, match="no adapter 'other'"):
        adapters.save(model, tmp_path / "b", name="other")
    place = adapters.save(model, tmp_path / "c")
    with pytest.raises(CorankError, match="does not fit this model"):
        adapters.load(tiny("gpt2-conv1d"), place)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **GQA, intermediate_size=40))
    with pytest.raises(CorankError, match=r"gate_proj is \[40, 24\], and the adapter is for \[37, 24\]"):
        adapters.load(other, place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "full"]
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(CorankError, match=r"pip install 'corank\[train\]'"):
        adapters.attach(tiny("llama-gqa"), "curing", rank=4)


def test_what_starts_as_a_part_of_the_weights_is_not_loaded_onto_all_of_them(tmp_path):
    """PEFT's own save_pretrained does not convert; what it writes is refused, with or without corank."""
    model = attached(tiny("llama-gqa"), "pissa")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="corank.adapters.save"):
        peft.PeftModel.from_pretrained(tiny("llama-gqa"), tmp_path)
    # on weights it was attached to again it is right: resuming training
    disturb(model)
    model.save_pretrained(tmp_path)
    again = attached(tiny("llama-gqa"), "pissa")
    again.load_adapter(tmp_path, "default")
    assert torch.equal(logits(again), logits(model))


def test_the_trainer_trains_and_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def run(steps, **more):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
            disable_tqdm=True, lr_scheduler_type="constant", logging_strategy="no",
        )  # fmt: skip
        model = attached(tiny("llama-gqa"), "tcurlora", task_type="CAUSAL_LM")
        Trainer(model, arguments, train_dataset=rows).train(**more)
        return logits(model)

    whole = run(4)
    run(2)
    assert torch.equal(run(4, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")), whole)
