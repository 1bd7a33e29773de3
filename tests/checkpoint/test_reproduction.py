"""The card of a compressed model says how to make it again, and that is true to the last bit."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import transformers as tf

import corank
import tiny
from corank.cli import main
from corank.model import Text
from corank.report import model_card
from corank.report.card import reproduction

RUNS = {
    "metric": ["--method", "asvd", "--set", "alpha=0.3", "--keep", "0.7", "--seed", "3"],
    "packed": ["--method", "svd-llm", "--set", "pack=true", "--targets", "q,re:.*down_proj", "--remove", "30%"],
    "own-rule": ["--method", "curing", "--seed", "1"],
    "narrow": ["--method", "svd-llm", "--params", "13K", "--dtype", "bfloat16", "--ignore", "o", "--batch", "3"],
}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A directory with a text, where the alias smollm2-135m is a tiny random model."""
    root = tmp_path_factory.mktemp("room")
    tiny.saved("llama-gqa", root / "cache" / "smollm2-135m")
    (root / "words.txt").write_text(tiny.text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORANK_CACHE", str(root / "cache"))
        patch.chdir(root)
        yield root


def command_of(folder):
    (block,) = re.findall(r"## To do it again\n\n```bash\n(.*)\n```", (folder / "README.md").read_text())
    return shlex.split(block)


@pytest.mark.parametrize("name", RUNS)
def test_the_command_on_the_card_makes_the_same_weights(name, room, monkeypatch):
    run = ["compress", "smollm2-135m", *RUNS[name], "--data", str(room / "words.txt"), "--samples", "5"]
    assert main([*run, "--length", "16", "--out", name, "--no-eval", "--quiet"]) == 0
    words = command_of(room / name)
    assert words[:3] == ["corank", "compress", "smollm2-135m"] and words[-2:] == ["--out", "again"]
    assert str(room) not in " ".join(words)  # paths of this machine are nobody's business
    again = f"{name}-again"
    assert main([*words[1:-1], again, "--quiet"]) == 0
    assert (room / again / "model.safetensors").read_bytes() == (room / name / "model.safetensors").read_bytes()
    one, two = (json.loads((room / n / "config.json").read_text())["quantization_config"] for n in (name, again))
    assert one["plan"] == two["plan"] and one["files"] == two["files"] and one["modules"] == two["modules"]


def test_the_seed_and_the_settings_on_the_card_matter(room):
    """What makes the test above able to fail."""
    words = command_of(room / "metric")
    made = {}
    for flag, value in (("--seed", "4"), ("--set", "alpha=0.9")):
        changed = list(words)
        changed[changed.index(flag) + 1] = value
        out = f"other{flag}"
        assert main([*changed[1:-1], out, "--quiet"]) == 0
        made[flag] = (room / out / "model.safetensors").read_bytes()
    assert (room / "metric" / "model.safetensors").read_bytes() not in made.values()


def test_a_model_made_to_a_quality_is_made_again_by_its_size(room):
    run = ["--max-perplexity-increase", "60%", "--heldout", "words.txt", "--data", "words.txt", "--method", "svd"]
    assert main(["compress", "smollm2-135m", *run, "--length", "16", "--out", "good", "--no-eval", "--quiet"]) == 0
    words = command_of(room / "good")
    assert "--keep" in words and "--max-perplexity-increase" not in words
    assert main([*words[1:-1], "good-again", "--quiet"]) == 0
    one, two = ((room / n / "model.safetensors").read_bytes() for n in ("good", "good-again"))
    assert one == two


def test_config_and_report_hold_what_was_done(room):
    """Recipe, plan, seed, data hash, versions; the numbers before and after are on the card when they are measured."""
    section = json.loads((room / "packed" / "config.json").read_text())["quantization_config"]
    assert section["recipe"]["method"] == "svd-llm" and section["recipe"]["parameters"]["pack"] == "true"
    assert section["recipe"]["budget"] == {"remove": 0.3, "scope": "sites"}
    modules = section["modules"]
    for site, choice in section["plan"]["choices"].items():
        found = modules.get(site, {"kind": "dense"})["kind"]
        assert found == choice["kind"] or (found, choice["kind"]) == ("row_pivoted", "low_rank")
    provenance = section["provenance"]
    assert provenance["seed"] == 0 and provenance["model"] == "smollm2-135m"
    assert provenance["data"]["sha256"] == Text(tiny.text(), "words.txt").sha256
    assert provenance["data"] | {"samples": 5, "length": 16, "batch": 8} == provenance["data"]
    assert provenance["versions"].keys() >= {"corank", "python", "torch", "transformers", "dtype", "compute_dtype"}
    card = (room / "packed" / "README.md").read_text()
    assert provenance["data"]["sha256"] in card and tf.__version__ in card and "calibrated on words.txt" in card
    run = ["--method", "svd", "--keep", "0.7", "--text", "words.txt", "--windows", "2", "--window", "16"]
    assert main(["compress", "smollm2-135m", *run, "--out", "judged", "--quiet"]) == 0
    assert "| Perplexity, words.txt |" in (room / "judged" / "README.md").read_text()


def test_there_is_no_command_for_data_that_are_not_text():
    report = corank.Report("vit", "svd-llm", data={"text": "examples", "sha256": "ab" * 32, "samples": 4})
    assert reproduction(report) is None and "takes them as `data=`" in model_card(report)


def test_a_mixture_of_texts_is_several_options():
    words = shlex.split(reproduction(corank.Report("org/model", "svd", data={"text": "builtin + words.txt"})))
    assert [words[i + 1] for i, word in enumerate(words) if word == "--data"] == ["builtin", "words.txt"]


def test_weights_that_were_trained_afterwards_are_not_claimed_to_come_from_the_command():
    healing = [{"how": "kd", "trained": 1500, "before": 0.5, "after": 0.25, "seconds": 3.0}]
    afterwards = model_card(corank.Report("org/model", "svd", extra={"healing": healing}))
    assert (
        "These are the weights before healing; `corank heal` then trained them: `kd` (1,500 parameters)." in afterwards
    )
    within = model_card(corank.Report("org/model", "svd", parameters={"heal": "kd"}, extra={"healing": healing}))
    assert "before healing" not in within and "--set heal=kd" in within


def test_settings_are_written_as_they_are_typed():
    parameters = {"a": True, "b": None, "c": ["x", "y z"], "d": 1e-6, "e": 3}
    words = shlex.split(reproduction(corank.Report("org/model", "svd", parameters=parameters, budget={"bytes": 7})))
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert settings == ["a=true", "b=none", "c=x,y z", "d=1e-06", "e=3"]
    assert words[words.index("--bytes") + 1] == "7" and "--data" not in words


def test_a_directory_written_from_python_has_its_card_too(tmp_path):
    corank.compress(tiny.saved("llama-gqa", tmp_path / "dense"), "svd", keep=0.6, out=tmp_path / "small")
    assert "corank compress" in (tmp_path / "small" / "README.md").read_text()
