"""lm-eval through corank: its scores are those of log-likelihoods computed directly, offline, on local task data."""

from __future__ import annotations

import json
import math

import datasets
import pytest
import torch

import corank
from corank import CorankError
from corank.cli import main
from corank.evaluate.tasks import run_tasks

WORDS = "abcdefghi"

CHOICE = """\
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: choice.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{options}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: brier_score
metadata: {version: 1.0}
"""
ROLLING = """\
task: toy_rolling
dataset_path: json
dataset_kwargs:
  data_files: {test: pages.jsonl}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
metadata: {version: 1.0}
"""
BOTH = """\
group: toys
task:
  - toy_choice
  - toy_rolling
"""


def letters(generator, count):
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """(folder with two tasks and a group of both, questions, pages); one page is longer than the model's context."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    generator = torch.Generator().manual_seed(3)
    questions = [
        # options of different lengths in tokens and in bytes
        {"question": letters(generator, 5), "options": [letters(generator, n) for n in (1, 3, 2)], "answer": i % 3}
        for i in range(24)
    ]
    pages = [{"page": letters(generator, n)} for n in (3, 20, 150)]
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("both", BOTH)):
        (folder / f"{name}.yaml").write_text(text)
    for name, rows in (("choice", questions), ("pages", pages)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, questions, pages


@torch.no_grad()
def log_likelihood(model, context, continuation):
    """log P(continuation | context), both lists of token ids."""
    logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


def rolling(model, prefix, tokens, window):
    """log P(tokens), every token predicted from as many before it as its window of the context holds."""
    stream, total, done = [prefix, *tokens], 0.0, 0
    while done < len(tokens):
        end = min(done + window, len(tokens))
        start = max(0, end - window)
        total += log_likelihood(model, stream[start : done + 1], tokens[done:end])
        done = end
    return total


def expected(model, tokenizer, questions, pages, bos):
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    begin = [tokenizer.bos_token_id] if bos else []
    acc = norm = brier = 0.0
    for row in questions:
        scores = [log_likelihood(model, begin + ids(row["question"]), ids(o)) for o in row["options"]]
        shares = [s / len(o) for s, o in zip(scores, row["options"], strict=True)]
        truth = torch.eye(3, dtype=torch.float64)[row["answer"]]
        acc += scores.index(max(scores)) == row["answer"]
        norm += shares.index(max(shares)) == row["answer"]
        brier += float((torch.tensor(scores, dtype=torch.float64).softmax(0) - truth).square().sum())
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    total = sum(rolling(model, prefix, begin + ids(row["page"]), 64) for row in pages)
    words = sum(len(row["page"].split()) for row in pages)
    size = sum(len(row["page"].encode()) for row in pages)
    return {
        ("toy_choice", "acc"): acc / len(questions),
        ("toy_choice", "acc_norm"): norm / len(questions),
        ("toy_choice", "brier_score"): brier / len(questions),
        ("toy_rolling", "word_perplexity"): math.exp(-total / words),
        ("toy_rolling", "bits_per_byte"): -total / size / math.log(2),
    }


@pytest.mark.parametrize("begins", ["adds a BOS token", "has one and does not add it", "has none"])
def test_scores_are_those_of_a_direct_computation(begins, tasks, make_model, make_tokenizer, tmp_path):
    folder, questions, pages = tasks
    bos = begins == "adds a BOS token"
    model, tokenizer = make_model(), make_tokenizer(adds_bos=bos, bos=begins != "has none")
    found = run_tasks(model, tokenizer, ["toys"], tasks_dir=folder, bootstrap=0, quiet=True)
    assert found.bos is bos and found.file is None and found.version
    values = {(s.task, s.metric): s.value for s in found.scores}
    wanted = expected(model, tokenizer, questions, pages, bos)
    assert 0 < wanted["toy_choice", "acc"] < 1  # else any order of the options would do
    assert values == pytest.approx(wanted, rel=1e-5)
    assert {s.task: s.samples for s in found.scores} == {"toy_choice": 24, "toy_rolling": 3}
    assert {s.metric: s.higher_is_better for s in found.scores}["word_perplexity"] is False
    assert tokenizer.pad_token is None  # lm-eval needs one, and has given it to a copy


def test_a_tokenizer_may_be_told_not_to_add_the_token_it_adds(tasks, make_model, make_tokenizer):
    folder, questions, pages = tasks
    model, tokenizer = make_model(), make_tokenizer()
    found = run_tasks(model, tokenizer, ["toys"], tasks_dir=folder, bos=False, bootstrap=0, quiet=True)
    wanted = expected(model, tokenizer, questions, pages, bos=False)
    assert found.bos is False
    assert {(s.task, s.metric): s.value for s in found.scores} == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(CorankError, match="adds no BOS"):
        run_tasks(model, make_tokenizer(adds_bos=False), ["toys"], tasks_dir=folder, bos=True)


def test_the_same_from_a_compressed_model_in_memory_and_from_its_directory(tasks, make_model, make_tokenizer, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, questions, pages = tasks
    tokenizer = make_tokenizer()
    model = make_model()
    corank.compress(model, "svd", keep=0.6, tokenizer=tokenizer, out=tmp_path / "small")
    pairs = [(row["question"], " " + option) for row in questions for option in row["options"]]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    pieces = [Instance("loglikelihood_rolling", {}, (row["page"],), i) for i, row in enumerate(pages)]
    here = HFLM(pretrained=model, tokenizer=make_tokenizer(), add_bos_token=True)
    there = HFLM(pretrained=str(tmp_path / "small"), device="cpu", add_bos_token=True)
    assert type(there.model.model.layers[0].mlp.up_proj).__name__ == "LowRankLinear"
    for kind, asked in (("loglikelihood", requests), ("loglikelihood_rolling", pieces)):
        assert getattr(here, kind)(asked, disable_tqdm=True) == getattr(there, kind)(asked, disable_tqdm=True)
    loaded, words = corank.load(tmp_path / "small")
    found = run_tasks(loaded, words, ["toys"], tasks_dir=folder, bootstrap=0, quiet=True)
    wanted = expected(model, tokenizer, questions, pages, bos=True)
    assert {(s.task, s.metric): s.value for s in found.scores} == pytest.approx(wanted, rel=1e-5)


def test_the_command_keeps_the_json_of_lm_eval_and_prints_a_summary(
    tasks, make_model, make_tokenizer, tmp_path, monkeypatch, capsys
):
    folder, questions, _ = tasks
    small = tmp_path / "small"
    corank.compress(make_model(), "svd", keep=0.6, tokenizer=make_tokenizer(), out=small)
    elsewhere = tmp_path / "elsewhere"  # data files are found from the folder of the tasks, not from here
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    file = elsewhere / "kept" / "lm-eval.json"
    command = ["eval", str(small), "--tasks", "toy_choice", "--tasks-dir", str(folder), "--limit", "10", "--quiet"]
    assert main([*command, "--results", str(file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [p.name for p in file.parent.iterdir()] == ["lm-eval.json"]
    kept = json.loads(file.read_text())
    (acc,) = (s for s in printed["tasks"]["scores"] if s["metric"] == "acc")
    assert kept["results"]["toy_choice"]["acc,none"] == acc["value"]
    assert kept["results"]["toy_choice"]["acc_stderr,none"] == pytest.approx(acc["stderr"])
    assert acc["samples"] == kept["n-samples"]["toy_choice"]["effective"] == 10 and acc["shots"] == 0
    assert kept["config"]["model_args"] == {"pretrained": str(small), "add_bos_token": True}
    assert kept["model_name"] == str(small) and kept["lm_eval_version"] == printed["tasks"]["version"]
    assert printed["perplexity"] == {}

    assert main([*command, "--results", str(file)]) == 2  # told before anything is computed
    assert "exists" in capsys.readouterr().err and json.loads(file.read_text()) == kept

    assert main(command) == 0  # without --results it goes into a file here, which the last line names
    shown = capsys.readouterr().out
    (own,) = elsewhere.glob("small-lm-eval-*.json")
    assert "toy_choice" in shown and "acc_norm" in shown and own.name in shown
    assert json.loads(own.read_text())["results"] == kept["results"]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"tasks": ["toy_choise"]}, "nearest: toy_choice"),
        ({"tasks": [""]}, "at least one task"),
        ({"limit": 0}, "limit=0"),
        ({"limit": 2.5}, "whole number"),
        ({"shots": -1}, "negative"),
        ({"chat": True}, "chat template"),
        ({"tasks_dir": "nowhere"}, "no folder"),
    ],
)
def test_bad_input_is_one_sentence(change, message, tasks, make_model, make_tokenizer, monkeypatch):
    import lm_eval.tasks

    # The tasks that come with lm-eval take half a minute to index.
    index = lm_eval.tasks.TaskManager.__init__
    monkeypatch.setattr(
        lm_eval.tasks.TaskManager, "__init__", lambda self, **kw: index(self, **(kw | {"include_defaults": False}))
    )
    options = {"tasks": ["toys"], "tasks_dir": tasks[0], "quiet": True} | change
    with pytest.raises(CorankError, match=message):
        run_tasks(make_model(), make_tokenizer(), **options)


def test_missing_data_and_empty_folders_say_what_to_do(tasks, make_model, make_tokenizer, tmp_path):
    folder, _, _ = tasks
    (folder / "pages.jsonl").unlink()
    results = tmp_path / "results.json"
    with pytest.raises(CorankError, match="toys could not be loaded.*--tasks-dir FOLDER"):
        run_tasks(make_model(), make_tokenizer(), ["toys"], tasks_dir=folder, results=results, quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorankError, match="no lm-eval task file"):
        run_tasks(make_model(), make_tokenizer(), ["toys"], tasks_dir=tmp_path / "empty", results=results, quiet=True)
    assert not results.exists() and not list(tmp_path.glob(".lm-eval.*"))


def test_a_model_that_is_no_language_model_is_refused(make_tokenizer):
    import transformers as tf

    sizes = dict(vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(CorankError, match="BertForMaskedLM"):
        run_tasks(tf.BertForMaskedLM(tf.BertConfig(**sizes)), make_tokenizer(), ["toys"])
