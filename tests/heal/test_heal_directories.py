"""`corank heal` from directory to directory: every way, every kind, plain models, reports, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers as tf

import corank
from corank import healing
from corank.cli import build_parser, main
from corank.errors import CorankError
from corank.factors import FactorizedLinear
from corank.heal import WHAT, Schedule, list_ways
from corank.healing import heal
from corank.model import Text
from factorized import mixed, tied_in_factors
from tiny import GQA, SIZES, saved, text, tiny, tokenizer

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TEXT = Text(text(), "words")
SMALL = dict(data=TEXT, samples=12, length=16)


def written(model, folder, words=None):
    if any(isinstance(m, FactorizedLinear) for m in model.modules()):
        corank.checkpoint.save(model, words or tokenizer(), folder)
    else:
        model.save_pretrained(folder)
        (words or tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A model with factors of every kind, the dense one it was made from, and a text."""
    folder = tmp_path_factory.mktemp("room")
    dense = tiny("llama-gqa")
    del dense.model.layers[2:]
    dense.config.num_hidden_layers = 2
    written(dense, folder / "dense")
    written(mixed(), folder / "small")
    (folder / "words.txt").write_text(text())
    return folder


def command(room, *rest):
    fixed = "--samples 12 --length 16 --epochs 1 --quiet"
    return main(["heal", "--data", str(room / "words.txt"), *fixed.split(), *map(str, rest)])


@pytest.mark.parametrize("how", sorted(list_ways()))
def test_every_way_writes_a_checkpoint_of_the_same_kind(room, how, tmp_path, capsys):
    order = (
        "--teacher",
        room / "dense",
        "--how",
        how,
        "--learning-rate",
        "1e-4",
        "--no-eval",
        "--out",
        tmp_path / "out",
    )
    assert command(room, room / "small", *order) == 0, capsys.readouterr().err
    assert re.search(r"parameters healed in .* -> ", capsys.readouterr().out)
    corank.checkpoint.verify(tmp_path / "out")
    (before, _), (after, _) = corank.load(room / "small"), corank.load(tmp_path / "out")
    old, new = before.state_dict(), after.state_dict()
    assert {n: p.shape for n, p in old.items()} == {n: p.shape for n, p in new.items()}
    frozen = [
        f"{n}.{part}.weight" for n, m in before.named_modules() if isinstance(m, FactorizedLinear) for part in m.frozen
    ]
    assert frozen and all(torch.equal(old[n], new[n]) for n in (*frozen, "lm_head.weight", "model.embed_tokens.weight"))
    assert json.loads((tmp_path / "out" / "healing.json").read_text())["how"] == how
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command_knows_every_way_and_every_choice():
    actions = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    heal_options = {a.dest: a.choices for a in actions["heal"]._actions}
    assert heal_options["how"] == sorted(list_ways()) and set(heal_options["what"]) == set(WHAT)
    assert {a.dest: a.choices for a in actions["compress"]._actions}["heal"] == ("none", *sorted(list_ways()))


def smaller(**sizes):
    torch.manual_seed(1)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **GQA, "intermediate_size": 20, **sizes}))


@pytest.mark.parametrize("sizes", [dict(num_hidden_layers=1), dict(hidden_size=16)], ids=["fewer layers", "narrower"])
def test_a_plain_smaller_model_learns_from_predictions(room, sizes, tmp_path, capsys):
    written(smaller(**sizes), tmp_path / "small")
    order = dict(teacher=room / "dense", schedule=Schedule(epochs=4, learning_rate=3e-3), **SMALL)
    healed = heal(tmp_path / "small", out=tmp_path / "out", **order)
    assert healed.after < healed.before
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any(isinstance(m, FactorizedLinear) for m in model.modules())
    for how, words in (("block", "how=kd"), ("lrc-only", "nothing that lrc-only trains")):
        with pytest.raises(CorankError, match=words):
            heal(tmp_path / "small", how=how, out=tmp_path / "bad", **order)
    assert not (tmp_path / "bad").exists() and not (tmp_path / "bad.healing").exists()


def test_factors_of_a_tied_pair_learn_too(tmp_path):
    written(tied_in_factors(), tmp_path / "small")
    dense = saved("llama-tied", tmp_path / "dense")
    schedule = Schedule(epochs=3, learning_rate=1e-3)
    healed = heal(tmp_path / "small", dense, out=tmp_path / "out", schedule=schedule, **SMALL)
    before, after = (corank.load(tmp_path / d)[0].lm_head.down.weight for d in ("small", "out"))
    assert healed.after < healed.before and not torch.equal(before, after)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two layers of four experts, and the same with factors."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    sizes = {**SIZES, **GQA, "num_hidden_layers": 2, "intermediate_size": 20, "num_local_experts": 4}
    dense = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes)).eval()
    with torch.no_grad():
        for p in dense.parameters():
            if p.ndim > 1:
                p.mul_(6.0)
    written(dense, folder / "dense")
    corank.compress(folder / "dense", "svd-llm", keep=0.6, out=folder / "small", data=TEXT, samples=20, length=16)
    return folder


@pytest.mark.parametrize("how", ["kd", "local", "closed-form"])
def test_experts(experts, how, tmp_path):
    schedule = Schedule(epochs=2, learning_rate=1e-3)
    order = dict(data=TEXT, samples=24, length=16, schedule=schedule)
    healed = heal(experts / "small", how=how, out=tmp_path / "out", **order)
    assert healed.after < healed.before
    before, after = (corank.load(d)[0].state_dict() for d in (experts / "small", tmp_path / "out"))
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert any(".experts." in n for n in changed)
    assert how == "kd" or not any("router" in n or "gate.weight" in n for n in changed)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    dense = saved("llama-gqa", folder / "dense")
    corank.compress(dense, "svd-llm", keep=0.5, out=folder / "small", **SMALL)
    (folder / "words.txt").write_text(text())
    return folder


def test_the_report_shows_how_the_loss_fell(compressed, tmp_path, capsys):
    order = ("--learning-rate", "1e-3", "--windows", "2", "--window", "32", "--out", tmp_path / "out")
    assert command(compressed, compressed / "small", "--how", "block", *order) == 0, capsys.readouterr().err
    step = json.loads((tmp_path / "out" / "report.json").read_text())["healing"][0]
    assert step["curve"][0] == [0.0, pytest.approx(step["before"])] and step["curve"][-1][1] == pytest.approx(
        step["after"]
    )
    seconds = [s for s, _ in step["curve"]]
    assert len(seconds) == 4 and seconds == sorted(seconds) and seconds[-1] == pytest.approx(step["seconds"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "held out from healing" in page and "Healing with block takes" in page
    assert main(["plot", str(tmp_path / "out"), "--out", str(tmp_path / "plots"), "--quiet"]) == 0
    assert list((tmp_path / "plots").glob("*healing*.png"))


def test_text_to_test_with_is_not_healed_with(compressed, tmp_path, capsys):
    same = compressed / "words.txt"
    assert command(compressed, compressed / "small", "--text", same, "--out", tmp_path / "out") == 2
    assert "occurs in the text to heal with" in capsys.readouterr().err
    order = [
        "compress",
        compressed / "dense",
        "--method",
        "svd-llm",
        "--heal",
        "kd",
        "--data",
        same,
        "--out",
        tmp_path / "c",
    ]
    size = ["--samples", 12, "--length", 16, "--quiet"]
    assert main([*map(str, order), *map(str, size), "--keep", "0.5", "--text", str(same)]) == 2
    assert "occurs in the text to heal with" in capsys.readouterr().err
    held = ["--max-perplexity-increase", "5%", "--heldout", str(same), "--no-eval"]
    assert main([*map(str, order), *map(str, size), *held]) == 2
    assert "occurs in the text to heal with" in capsys.readouterr().err
    with pytest.raises(CorankError, match="occurs in the text to heal with"):
        corank.compress(compressed / "dense", "svd-llm", keep=0.5, heal="kd", data="builtin-test", out=tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_teachers_that_read_other_tokens_are_refused(compressed, tmp_path):
    words = tokenizer()
    vocabulary = {token: 63 - i for token, i in words.get_vocab().items()}
    state = json.loads(words.backend_tokenizer.to_str())
    state["model"]["vocab"] = vocabulary
    state["added_tokens"] = []
    other = tf.PreTrainedTokenizerFast(tokenizer_object=type(words.backend_tokenizer).from_str(json.dumps(state)))
    teacher = written(tiny("llama-gqa"), tmp_path / "teacher", other)
    with pytest.raises(CorankError, match="different tokenizers"):
        heal(compressed / "small", teacher, out=tmp_path / "out", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]


def test_a_compressed_model_is_no_teacher(compressed, tmp_path):
    with pytest.raises(CorankError, match="compressed or quantized itself"):
        heal(compressed / "small", compressed / "small", out=tmp_path / "out", **SMALL)


def test_quantized_factors_are_not_healed(compressed, tmp_path):
    pytest.importorskip("torchao")
    assert main(["quantize", str(compressed / "small"), "--out", str(tmp_path / "int8"), "--quiet"]) == 0
    with pytest.raises(CorankError, match="heal the model as it was before"):
        heal(tmp_path / "int8", compressed / "dense", out=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_at_the_end_keeps_the_training(compressed, tmp_path, monkeypatch):
    schedule = Schedule(epochs=2, learning_rate=1e-3)
    whole = heal(compressed / "small", out=tmp_path / "whole", schedule=schedule, **SMALL)
    with monkeypatch.context() as patch:

        def full(*args, **settings):
            raise CorankError("The disk is full.")

        patch.setattr(healing.checkpoint, "save", full)
        with pytest.raises(CorankError, match="disk is full"):
            heal(compressed / "small", out=tmp_path / "out", schedule=schedule, **SMALL)
    assert (tmp_path / "out.healing" / "kd.pt").is_file() and not (tmp_path / "out").exists()
    steps = []
    again = heal(
        compressed / "small",
        out=tmp_path / "out",
        schedule=schedule,
        progress=lambda what, done, of, value: steps.append(done) if what == "distillation" else None,
        **SMALL,
    )
    assert again.after == whole.after and len(steps) == 1  # nothing was trained again
    one, other = (corank.load(tmp_path / d)[0].state_dict() for d in ("whole", "out"))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_compressing_with_any_way_to_heal(compressed, tmp_path):
    settings = dict(data=TEXT, samples=40, length=16, keep=0.9)
    report = corank.compress(
        compressed / "dense",
        "curing",
        layers=1,
        rank=6,
        heal="curing",
        epochs=4,
        minutes=5,
        out=tmp_path / "out",
        **{**settings, "keep": None},
    )
    assert report.extra["healing"][0]["how"] == "curing"
    links = [m for m in corank.load(tmp_path / "out")[0].modules() if isinstance(m, FactorizedLinear)]
    assert links and all(m.kind == "cur" for m in links)
    with pytest.raises(CorankError, match="lrc-only"):
        corank.compress(compressed / "dense", "svd", keep=0.5, heal="lcr-only", out=tmp_path / "bad")
    with pytest.raises(CorankError, match="minutes"):
        corank.compress(compressed / "dense", "svd", keep=0.5, heal="kd", minutes=0, out=tmp_path / "bad")
