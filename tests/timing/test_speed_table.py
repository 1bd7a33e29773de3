"""What the speed table refuses: a model that is not factorized, and a table without its dense row."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import rounds as turns  # noqa: E402
from benchmarks.shapes import SHAPES, TOY, TOY_BERT, dense_model, factorized_twin, require_factorized  # noqa: E402
from benchmarks.speed import PREDICTED  # noqa: E402
from benchmarks.speed_report import require_dense  # noqa: E402

from corank.checkpoint.skeleton import collect  # noqa: E402
from corank.model import outline  # noqa: E402
from corank.timing import RUNTIMES, find_device, predict  # noqa: E402


@pytest.mark.parametrize("shape", [TOY, TOY_BERT], ids=lambda s: s.name)
def test_the_twin_is_factorized_and_shares_the_rest(shape):
    dense = dense_model(shape.config())
    twin = factorized_twin(dense, 0.5, 4)
    sites = outline(dense.config, type(dense)).sites
    assert set(collect(twin)) == {s.name for s in sites} and not collect(dense)
    for site in sites:
        m, n = site.shape
        rank = twin.get_submodule(site.name).rank
        assert rank % 4 == 0 and rank * (m + n) <= 0.5 * m * n
    shared = {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert shared
    ids = torch.randint(64, (2, 5))
    with torch.no_grad():
        assert torch.isfinite(twin(input_ids=ids)[0]).all() and torch.isfinite(dense(input_ids=ids)[0]).all()


def test_a_truncated_twin_at_full_rank_is_the_model():
    dense = dense_model(TOY.config()).double()
    sites = outline(dense.config, type(dense)).sites
    # beyond the break-even nothing would be timed as factorized
    with pytest.raises(RuntimeError, match="not factorized"):
        factorized_twin(dense, 2.0, 1, of=True)
    twin = factorized_twin(dense, 0.9, 1, of=True)
    for site in sites:
        W, low = dense.get_submodule(site.name).weight, twin.get_submodule(site.name)
        tail = torch.linalg.svdvals(W)[low.rank :].square().sum().sqrt()
        torch.testing.assert_close((W - low.dense_weight()).norm(), tail, rtol=1e-4, atol=1e-6)


def test_a_dense_model_is_not_timed_as_a_factorized_one():
    dense = dense_model(TOY.config())
    sites = outline(dense.config, type(dense)).sites
    with pytest.raises(RuntimeError, match=f"{sites[0].name} is not factorized"):
        require_factorized(dense, sites)
    twin = factorized_twin(dense, 0.5, 4)
    last = sites[-1]
    twin.set_submodule(last.name, dense.get_submodule(last.name))
    with pytest.raises(RuntimeError, match=f"{last.name} is not factorized"):
        require_factorized(twin, sites)


def test_a_table_without_its_dense_row_is_not_printed():
    rows = [{"model": "x", "batch": b, "variant": v} for b in (1, 4) for v in ("dense", "factorized")]
    require_dense(rows)
    with pytest.raises(SystemExit, match="no dense row beside 'factorized'"):
        require_dense([row for row in rows if (row["batch"], row["variant"]) != (4, "dense")])
    single = [
        {"shape": [2, 3], "dtype": "float32", "tokens": t, "variant": v} for t in (1, 2) for v in ("dense", "keep 0.5")
    ]
    require_dense(single)
    with pytest.raises(SystemExit, match="no dense row"):
        require_dense(single[1:])


def test_rows_are_predicted_by_runtimes_that_exist():
    dense = dense_model(TOY.config())
    for runtime in PREDICTED.values():
        assert predict(dense, find_device("h200"), runtime=runtime).seconds > 0
    packed, eager = PREDICTED["packed"], RUNTIMES["eager"]
    assert packed.packed and packed.others == eager.others and packed.copies_cache and not eager.packed
    assert {s.name: s.layers for s in SHAPES.values()} == {
        "smollm2-135m": 30,
        "bert-base": 12,
        "llama-3.1-8b": 32,
        "llama-2-7b": 32,
    }


def test_contenders_take_turns_and_the_warm_up_is_not_counted():
    calls: list[str] = []
    ticks = iter(range(1000))
    found = turns.rounds(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, 1, clock=lambda: float(next(ticks))
    )
    assert calls == ["a", "b", "b", "a", "a", "b"] and [len(v) for v in found.values()] == [2, 2]
    assert turns.ratio([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_no_more_threads_than_free_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for load, asked, given in ((0.0, 4, 4), (5.5, 4, 2), (20.0, 4, 1), (0.0, 1, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load))
        assert turns.free_threads(asked) == given


def test_trials_are_not_quoted(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("speed_tables", ROOT / "docs" / "speed_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.linears_table() == tables.models_table() == tables.gpu_table() == tables.NOT_YET
    where = '"hardware": {"processor": "P", "gpu": null, "threads": 1, "torch": "2"}'
    row = '{"shape": [8, 4], "dtype": "float32", "tokens": 1, "variant": "keep 0.5, rank 2", "rank": 2, '
    row += '"speedup": {"median": 1.5}, "predicted_speedup": 1.75}'
    (tmp_path / "speed-p.json").write_text(f'{{{where}, "quick": true, "linears": [{row}]}}')
    assert tables.linears_table() == tables.NOT_YET
    (tmp_path / "speed-p.json").write_text(f'{{{where}, "quick": false, "linears": [{row}]}}')
    assert "| 8 × 4 | float32 | keep 0.5, rank 2 | 1.50 (1.75) |" in tables.linears_table()
