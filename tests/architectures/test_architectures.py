"""Every architecture family: compressed, saved, loaded in a fresh process, made dense; and the page that says so."""

from __future__ import annotations

import re
import shlex

import pytest
import transformers as tf
from families import FAMILIES, MLP, SIZES
from table import PAGE, measure, page

from corank.cli import main
from tiny import tokenizer


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return measure(tmp_path_factory.mktemp("architectures"))


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_and_in_memory_results_are_the_same_bits(results, name):
    assert results[name]["same bits"] and results[name]["same weights"]
    assert results[name]["error"] < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_process_with_corank_computes_the_same(results, name):
    assert results[name]["corank"] == {"equal": True, "info": [], "class": results[name]["class"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_process_without_corank_stops_instead_of_giving_random_weights(results, name):
    assert isinstance(results[name]["ignorant"], str) and "mismatch" in results[name]["ignorant"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shipped_module_loads_it_without_corank(results, name):
    assert results[name]["trusting"] == {"equal": True, "info": [], "class": results[name]["class"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_factors_are_on_disk_under_their_own_names(results, name):
    assert results[name]["names"]


@pytest.mark.parametrize("name", FAMILIES)
def test_made_dense_it_is_a_stock_model_that_computes_the_same(results, name):
    assert results[name]["dense"] == {"equal": True, "info": [], "class": results[name]["class"]}
    assert results[name]["dense error"] < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_budget_is_met_over_the_sites(results, name):
    report = results[name]["report"]
    sites = report.accounting["sites"]
    assert 0.5 * sites["dense"] < sites["compressed"] <= 0.7 * sites["dense"]
    assert sites["dense"] == sum(s.numel for s in results[name]["plan"].sites)
    assert all(0 <= row["loss"] < 1 for row in report.sites)


def test_the_page_is_up_to_date(results):
    assert PAGE.read_text() == page(results)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty directory, and a cache in which the alias smollm2-135m is a tiny random model with tied embeddings."""
    config = tf.LlamaConfig(**{**SIZES, "max_position_embeddings": 1024}, **MLP, tie_word_embeddings=True)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "cache" / "smollm2-135m")
    tokenizer().save_pretrained(tmp_path / "cache" / "smollm2-135m")
    (tmp_path / "room").mkdir()
    monkeypatch.setenv("CORANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "room")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.S)


def test_what_the_page_shows_runs(room, capsys):
    namespace: dict = {}
    for code in blocks("python"):
        exec(compile(code, str(PAGE), "exec"), namespace)
    assert namespace["report"].kept() <= 0.7
    lines = [line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("corank ")]
    assert lines
    for line in lines:
        assert main([*shlex.split(line)[1:], "--quiet"]) == 0, capsys.readouterr().err
