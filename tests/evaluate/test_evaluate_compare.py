from __future__ import annotations

import json
import math

import pytest

from corank.errors import CorankError
from corank.evaluate import Cell, compare, grid

CELLS = grid(["svd", "svd-llm"], [{"keep": 0.8}, {"params": "5.4e9"}], {"seed": 1})


def test_a_grid_is_the_product_in_order():
    points = [(c.method, dict(c.budget)) for c in CELLS]
    assert points == [
        ("svd", {"keep": 0.8}),
        ("svd", {"params": "5.4e9"}),
        ("svd-llm", {"keep": 0.8}),
        ("svd-llm", {"params": "5.4e9"}),
    ]
    assert all(c.options == {"seed": 1} for c in CELLS)


def test_names_depend_on_the_whole_cell_and_on_nothing_else():
    names = {c.name for c in CELLS}
    names |= {Cell("svd", {"keep": 0.8}, {"seed": 2}).name, Cell("svd", {"remove": 0.8}, {"seed": 1}).name}
    assert len(names) == 6
    assert Cell("svd", {"a": 1, "b": 2}).name == Cell("svd", {"b": 2, "a": 1}).name
    assert "/" not in Cell("a/b", {"path": "c/../d"}).name


def test_it_goes_on_where_it_stopped(tmp_path):
    ran: list[str] = []

    def run(cell):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell.name)
        return {"ppl": 10.0 + len(ran)}

    with pytest.raises(KeyboardInterrupt):
        compare(CELLS, run, tmp_path)
    assert ran == [c.name for c in CELLS[:2]]
    steps = []
    rows = compare(CELLS, lambda c: {"ppl": 0.0}, tmp_path, progress=lambda *step: steps.append(step))
    assert [row["ppl"] for row in rows] == [11.0, 12.0, 0.0, 0.0]
    assert [row["method"] for row in rows] == ["svd", "svd", "svd-llm", "svd-llm"]
    assert steps == [(2, 4, CELLS[2]), (3, 4, CELLS[3])]
    assert compare(CELLS, pytest.fail, tmp_path) == rows


def test_a_failed_cell_is_a_row_and_is_tried_again(tmp_path):
    def broken(cell):
        if cell.method == "svd":
            raise RuntimeError("out of memory")
        return {"ppl": 1.0}

    rows = compare(CELLS, broken, tmp_path)
    assert rows[0]["error"] == "RuntimeError: out of memory" and "ppl" not in rows[0]
    assert rows[2]["ppl"] == 1.0
    ran = []
    rows = compare(CELLS, lambda c: ran.append(c) or {"ppl": 2.0}, tmp_path)
    assert ran == CELLS[:2] and [r["ppl"] for r in rows] == [2.0, 2.0, 1.0, 1.0]
    with pytest.raises(RuntimeError):
        compare([Cell("svd")], broken, tmp_path, keep_going=False)


def test_infinities_survive_and_the_files_are_valid_json(tmp_path):
    cell = Cell("svd", {"keep": 0.1})
    compare([cell], lambda c: {"ppl": {"wiki": math.inf}, "curve": [[1, math.nan], [2, -math.inf]]}, tmp_path)
    text = (tmp_path / f"{cell.name}.json").read_text()
    plain = json.loads(text, parse_constant=pytest.fail)
    assert plain["ppl"]["wiki"] is None
    assert plain["nonfinite"] == {"/ppl/wiki": "inf", "/curve/0/1": "nan", "/curve/1/1": "-inf"}
    (row,) = compare([cell], pytest.fail, tmp_path)
    assert row["ppl"]["wiki"] == math.inf and math.isnan(row["curve"][0][1]) and "nonfinite" not in row


def test_a_broken_file_is_done_again(tmp_path):
    (tmp_path / f"{CELLS[0].name}.json").write_text('{"ppl": ')
    assert compare(CELLS[:1], lambda c: {"ppl": 3.0}, tmp_path)[0]["ppl"] == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{CELLS[0].name}.json"]


def test_bad_grids_and_results(tmp_path):
    with pytest.raises(CorankError, match="twice"):
        compare([CELLS[0], CELLS[0]], lambda c: {}, tmp_path)
    with pytest.raises(CorankError, match="JSON form"):
        compare(CELLS[:1], lambda c: {"model": object()}, tmp_path, keep_going=False)
    with pytest.raises(CorankError, match="dict"):
        compare(CELLS[:1], lambda c: 3.0, tmp_path, keep_going=False)
