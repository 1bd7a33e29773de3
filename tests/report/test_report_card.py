from __future__ import annotations

import ast
import json
import math
import re

import pytest
import yaml

from corank.report import Report, model_card, write_card


def front(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter(report):
    matter = front(model_card(report, cite="arXiv:2403.07378v2", license="apache-2.0"))
    assert matter["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert matter["library_name"] == "transformers" and matter["license"] == "apache-2.0"
    assert matter["tags"] == ["corank", "low-rank", "compressed", "svd-llm", "arxiv:2403.07378"]
    assert "license" not in front(model_card(report))


@pytest.mark.parametrize("model", ["/home/someone/secret/model", "./model", "C:\\secret\\model", "~/secret/x"])
def test_a_local_path_is_not_published(make_report, model):
    card = model_card(make_report(model=model, layers=1))
    assert "base_model" not in front(card)
    assert "/home/" not in card and ("secret" not in card or "\\" in model)


@pytest.mark.parametrize("method", ["a: b", "- x", "#1", 'say "so"', "é"])
def test_any_name_is_valid_yaml(make_report, method):
    assert front(model_card(make_report(method=method, layers=1)))["tags"][-1] == method


def test_the_code_imports_corank_first_and_is_python(report):
    card = model_card(report, name='me/it\'s "small"')
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    tree = ast.parse(code)
    first, second = tree.body[:2]
    assert isinstance(first, ast.Import) and first.names[0].name == "corank"
    assert isinstance(second, ast.ImportFrom) and second.module == "transformers"
    names = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert names == ['me/it\'s "small"'] * 2


def test_numbers_and_citation(report):
    card = model_card(report, cite="arXiv:2403.07378")
    assert "[arXiv:2403.07378](https://arxiv.org/abs/2403.07378)" in card
    assert "| Parameters over sites | 106.2 M | 84.93 M | 80.0% |" in card
    for label in ("Parameters of the model", "Bytes on disk", "FLOPs per token"):
        assert f"| {label} |" in card
    assert "| Perplexity, wikitext2 | 17.20 | 26.71 | 1.55× |" in card
    assert "Break-even rank" in card and "calibrated on wikitext-2 train" in card
    tables = re.findall(r"((?:^\|.*\|\n)+)", card, re.M)
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_limits_are_true_of_the_report():
    plain = Report("m", "svd")
    assert "has not been evaluated" in model_card(plain) and "speed has not been measured" in model_card(plain)
    lost = Report("m", "svd", evaluation={"dense": {"w": 3.0}, "compressed": {"w": math.nan}})
    assert "It has collapsed: its perplexity on w is not finite" in model_card(lost)
    worse = Report("m", "svd", evaluation={"dense": {"w": 3.0}, "compressed": {"w": 4.5}}, speed=[{"model": "a"}])
    assert "perplexity on w is 1.50× as high" in model_card(worse)
    assert "speed has not been measured" not in model_card(worse)
    better = Report("m", "svd", evaluation={"dense": {"w": 3.0}, "compressed": {"w": 2.5}})
    assert "predicts worse" not in model_card(better)


def test_the_protocol_of_the_perplexity_is_stated():
    entry = {"value": 4.0, "windows": 9, "window": 512, "bos": True, "tokens": 4599, "text_sha256": "ab" * 32}
    card = model_card(Report("m", "svd", evaluation={"dense": {"w": 3.0}, "compressed": {"w": entry}}))
    assert "- w: 9 windows of 512 positions, not overlapping, with the BOS token, 4599 predicted tokens" in card
    assert "`abababababababab`" in card


def test_it_is_written_as_readme(report, tmp_path):
    path = write_card(report, tmp_path, name="me/small")
    assert path == tmp_path / "README.md"
    assert path.read_text(encoding="utf-8") == model_card(report, name="me/small")


@pytest.mark.parametrize(
    ("architecture", "files", "words"),
    [
        (
            "LlamaForCausalLM",
            ["tokenizer_config.json"],
            ["AutoModelForCausalLM.from", "tokenizer = AutoTokenizer.from"],
        ),
        ("T5ForConditionalGeneration", ["tokenizer_config.json"], ["AutoModelForSeq2SeqLM.from"]),
        (
            "ResNetForImageClassification",
            ["preprocessor_config.json"],
            ["ImageClassification.from", "AutoProcessor.from"],
        ),
        ("Wav2Vec2ForCTC", [], ["AutoModelForCTC.from"]),
        ("BertModel", [], ["model = AutoModel.from"]),
    ],
)
def test_it_is_loaded_by_the_class_that_fits(architecture, files, words, tmp_path, report):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    for file in files:
        (tmp_path / file).write_text("{}")
    card = write_card(report, tmp_path).read_text()
    assert all(word in card for word in words)
    assert ("Tokenizer" in card or "Processor" in card) == bool(files)
