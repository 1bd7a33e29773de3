"""Models that do not run as one chain of blocks, and data that is not text."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from families import FAMILIES, MLP, SIZES, batches, inputs, logits, make
from torch import nn

import corank
from corank import checkpoint
from corank.engine.job import Job
from corank.engine.measure import measure_block
from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.model import Calibration, Examples, ResidentModel, StreamedModel, Text, outline
from corank.model.streaming import NotStreamable
from corank.recipe import get
from corank.statistics import InputGram
from tiny import text, tokenizer, windows

TEXT = Text(text(), "words")
DATA = dict(data=TEXT, samples=4, length=12, batch=2)


def test_an_encoder_and_a_decoder_run_as_a_whole(tmp_path):
    plan = outline(make("t5").config)
    assert plan.whole and plan.layers == 1 and plan.blocks == "" and plan.path(0) == ""
    assert {s.block for s in plan.sites} == {0, 1} and {s.layer for s in plan.sites} == {0}
    make("t5").save_pretrained(tmp_path)
    with pytest.raises(NotStreamable, match="does not run as one chain of blocks"):
        StreamedModel(tmp_path)


def test_cross_attention_reads_what_the_encoder_wrote():
    sites = {s.name: s for s in outline(make("t5").config).sites}
    keys = [s for n, s in sites.items() if n.endswith("EncDecAttention.k") or n.endswith("EncDecAttention.v")]
    assert len({s.group for s in keys}) == 1 and not any(s.decoder for s in keys)  # of all layers: one encoder output
    assert all(sites[n].decoder for n in sites if n.endswith("EncDecAttention.q"))
    assert all(s.decoder == n.startswith("decoder") for n, s in sites.items() if "SelfAttention" in n)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_statistics_are_those_of_hooks_on_the_model(name):
    """Also with padding, which lies elsewhere on the two sides."""
    model = make(name, torch.float64)
    if name == "t5":
        ids, mask = windows(4, 8, padded=True).ids, windows(4, 8, padded=True).mask
        target, seen = windows(4, 8, seed=5).ids, torch.ones(4, 8, dtype=torch.bool)
        seen[1:, 5:] = False  # as long as the encoder's, so that only the outline tells which is which
        batch = dict(input_ids=ids, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=seen)
        data = Examples.of([{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]).calibration()
    else:
        batch = {k: torch.cat([b[k] for b in batches(name)]) for k in batches(name)[0]}
        data = Examples.of(batches(name)).calibration()
        mask = seen = None
    source = ResidentModel(model, example=data.examples[0])
    sites = list(source.outline.sites)
    wanted, handles = {s.name: InputGram(s.shape[1]) for s in sites}, []
    for s in sites:
        rows = seen if s.decoder else mask
        hook = lambda _m, args, n=s.name, rows=rows: wanted[n].update(args[0], rows)  # noqa: E731
        handles.append(model.get_submodule(s.name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    for handle in handles:
        handle.remove()
    job = Job(source, get("svd-llm").recipe(), sites, None, data, None, source.dtype, batch=2)
    with source.block(0) as block:
        table = measure_block(job, block, 0, Stream(source, data, 2), {"gram"})
    for s in sites:
        assert table[s.group]["gram"].count == wanted[s.name].count
        torch.testing.assert_close(
            table[s.group]["gram"].result().G, wanted[s.name].result().G, rtol=1e-9, atol=1e-11, msg=s.name
        )


def test_text_is_read_by_the_encoder_and_continued_by_the_decoder():
    source = ResidentModel(make("t5"))
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 7:] = False
    batch = source.complete({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(batch["input_ids"], ids[:, :5])
    assert torch.equal(batch["decoder_input_ids"], torch.cat([torch.zeros(2, 1, dtype=torch.long), ids[:, 5:-1]], 1))
    assert batch["attention_mask"].sum(1).tolist() == [5, 5]
    assert batch["decoder_attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    assert torch.equal(source.complete(given)["decoder_input_ids"], ids[:, :3])


@pytest.mark.parametrize("settings", [dict(target="anchored"), dict(refit=True), dict(allocate="lagrange")], ids=str)
def test_every_way_of_compressing_works_on_a_whole_model(settings, tmp_path):
    model = make("t5")
    report = corank.compress(
        model, "svd-llm", keep=0.7, tokenizer=tokenizer(), out=tmp_path / "out", **settings, **DATA
    )
    assert all(0 <= r["loss"] < 1 for r in report.sites) and {r["layer"] for r in report.sites} == {0, 1}
    loaded, _ = checkpoint.load(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, inputs("t5")), logits(model, inputs("t5")))


def test_the_files_of_a_processor_travel_along(tmp_path):
    make("whisper").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text('{"sampling_rate": 16000}')
    corank.compress(tmp_path / "dense", "svd-llm", keep=0.7, data=batches("whisper"), out=tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"sampling_rate": 16000}'


def test_a_model_that_runs_its_layers_again_runs_as_a_whole():
    config = tf.AlbertConfig(**SIZES, **MLP, embedding_size=24)
    model = tf.AlbertForMaskedLM(config)
    plan = outline(model.config, type(model))
    assert plan.whole and len(plan.sites) == 6


class Between(tf.LlamaForCausalLM):
    """Does something of its own between two blocks."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] + 1, *args[1:]))


def test_blocks_that_are_handed_something_else_run_as_a_whole():
    config = FAMILIES["llama"].build().config
    assert not outline(config).whole and outline(config, Between).whole
    assert [s.name for s in outline(config, Between).sites] == [s.name for s in outline(config).sites]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "list of calibration data is empty"),
        (["some text"], "no text file some text"),
        (["some text", {}], "a list of dicts of tensors as the model takes them; found a str"),
        ([{"pixel_values": "x"}], "found a dict"),
    ],
)
def test_data_that_is_none_is_one_sentence(data, match):
    with pytest.raises(CorankError, match=match):
        corank.compress(make("vit"), "svd-llm", keep=0.7, data=data)


def test_inputs_a_model_does_not_take_are_one_sentence():
    with pytest.raises(CorankError, match="ViTForImageClassification could not be run on inputs of the shapes pixels"):
        corank.compress(make("vit"), "svd-llm", keep=0.7, data=[{"pixels": torch.zeros(1, 3, 8, 8)}])
    with pytest.raises(CorankError, match="does not run as one chain of blocks; choose another method"):
        corank.compress(make("t5"), "curing", keep=0.7, tokenizer=tokenizer(), **DATA)
    with pytest.raises(CorankError, match="gradients of the loss on text"):
        corank.compress(make("vit"), "fwsvd", keep=0.7, data=batches("vit"))
    with pytest.raises(CorankError, match="has no list of blocks"):
        outline(make("llama")._from_config(make("llama").config, attn_implementation="eager").config, Flat)


class Flat(tf.PreTrainedModel):
    config_class = tf.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.one = nn.Linear(4, 4)
        self.post_init()


def test_examples_are_told_apart_by_what_is_in_them():
    x = torch.arange(6.0).view(2, 3)
    a, b, c = (Examples.of([{"x": v}]).sha256 for v in (x, x.clone(), x + 1))
    assert a == b != c and len({a, c, Examples.of([{"y": x}]).sha256, Examples.of([{"x": x.T}]).sha256}) == 4
    data = Examples.of([{"x": x}, {"x": x[:1]}]).calibration()
    assert data.source["samples"] == 3 and len(data.batches(1)) == 2
    assert Calibration(torch.zeros(0, 0), None, {}).batches(4) == []
