from __future__ import annotations

import io
import math
import re
import statistics

import pytest
from rich.console import Console

from corank.report import Report, comparison_table, print_report, role_table, speed_table, summary_table
from corank.report import summary as rows


def shown(renderable, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def cells(text: str, first: str) -> list[str]:
    """The cells of the line that begins with ``first``."""
    (line,) = [line.strip() for line in text.splitlines() if re.match(rf"\s*{re.escape(first)}(\s{{2,}}|$)", line)]
    return re.split(r"\s{2,}", line)


def test_the_four_numbers_the_perplexities_and_the_facts(report):
    text = shown(summary_table(report))
    dense = sum(s["params_dense"] for s in report.sites)
    kept = sum(s["params"] for s in report.sites) / dense
    assert cells(text, "Parameters over sites")[1] == f"{dense / 1e6:.1f} M"
    assert cells(text, "Parameters over sites")[3] == f"{100 * kept:.1f}%"
    for label, account in (("Parameters of the model", "model"), ("FLOPs per token", "flops_per_token")):
        assert cells(text, label)[3] == f"{100 * report.kept(account):.1f}%"
    assert cells(text, "Bytes on disk")[1] == f"{report.accounting['bytes']['dense'] / 2**20:.1f} MiB"
    compressed = report.evaluation["compressed"]["wikitext2"]
    assert cells(text, "Perplexity, wikitext2")[1:] == [
        "17.20",
        f"{compressed:.2f}",
        f"{compressed / 17.2:.2f}×",
    ]
    assert cells(text, "Break-even rank")[1].startswith("q, o: 288")
    assert cells(text, "Time")[1].startswith("1:46")
    assert cells(text, "Peak memory")[1] == "1.615 GiB"
    assert cells(text, "Seed")[1] == "0"


def test_by_role(report):
    text = shown(role_table(report))
    for role in report.roles:
        mine = [s for s in report.sites if s["role"] == role]
        ranks = [s["rank"] for s in mine if s["kind"] != "dense"]
        row = cells(text, role)
        assert row[1:4] == ["30", str(30 - len(ranks)), f"{min(ranks)}–{max(ranks)}"]
        kept = sum(s["params"] for s in mine) / sum(s["params_dense"] for s in mine)
        assert row[5] == f"{100 * kept:.1f}%"
        assert float(row[6]) == pytest.approx(statistics.fmean(s["loss"] for s in mine), rel=5e-3)
        assert float(row[7]) == pytest.approx(statistics.fmean(s["predicted_loss"] for s in mine), rel=5e-3)
        assert float(row[8]) == pytest.approx(max(s["loss"] for s in mine), rel=5e-3)
    assert cells(text, "all")[1] == "210" and cells(text, "all")[5] == "80.0%"


def test_comparison_has_the_dense_model_first(reports):
    text = shown(comparison_table(reports))
    assert cells(text, "dense")[2:6] == ["100.0%"] * 4 and cells(text, "dense")[6] == "17.20 (1.00×)"
    table = rows.comparison_table(reports)
    assert [row[:2] for row in table.rows[1:3]] == [
        ("svd", "keep=0.9"),
        ("svd", "keep=0.8"),
    ]  # not scope: shared
    last = dict(zip(table.head, table.rows[-1], strict=True))
    ratio = reports[-1].perplexity_ratio("wikitext2")
    assert last["PPL wikitext2"] == f"{17.2 * ratio:.2f} ({ratio:.2f}×)"
    assert len(table.rows) == 10


def test_comparison_of_two_models_and_of_bare_reports():
    bare = [Report(model=m, method="svd") for m in ("a", "b")]
    table = rows.comparison_table(bare)
    assert [row[0] for row in table.rows] == ["dense a", "svd", "dense b", "svd"]
    assert table.head == ("Method", "Budget", "Sites kept")


def test_speed_shows_the_range_of_the_ratio(report):
    text = shown(speed_table(report.speed))
    lines = [line for line in text.splitlines() if "svd-llm" in line]
    assert len(lines) == 2 and "1.17× (1.11–1.24)" in lines[0] and "61%" in lines[0]
    assert "257 MiB" in text and "270 M" in text


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_narrow_terminal_gets_whole_numbers(reports, width):
    text = shown(comparison_table(reports), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "keep=0.8" in text and "26.71 (1.55×)" in text
    assert ("no room for" in text) == (width < 120)


def test_collapse_and_missing_values_are_called_by_their_names(make_report):
    report = make_report(
        accounting={},
        evaluation={"dense": {"wiki": 10.0}, "compressed": {"wiki": math.inf, "talk": math.nan}},
        stages={},
        peak_memory_bytes=None,
    )
    text = shown(summary_table(report))
    assert cells(text, "Perplexity, wiki")[1:] == ["10.00", "inf", "inf"]
    assert cells(text, "Perplexity, talk")[1:] == ["–", "NaN", "–"]
    assert cells(text, "Bytes on disk")[1:] == ["–", "–", "–"]
    assert "Time" not in text and "Peak" not in text


def test_other_measures_show_the_difference():
    measure = {"metric": "acc", "value": 0.5}
    report = Report(
        "m", "svd", evaluation={"dense": {"arc": measure}, "compressed": {"arc": measure | {"value": 0.375}}}
    )
    assert rows.evaluation_changes(report) == [("acc, arc", "0.5000", "0.3750", "-0.125")]


def test_everything_is_printed_and_nothing_is_markup(make_report):
    report = make_report(model="a/[red]b[/red]", warnings=["beware of [bold]brackets[/bold]"])
    console = Console(file=io.StringIO(), width=150, color_system=None)
    print_report(report, console)
    text = console.file.getvalue()
    assert "a/[red]b[/red] → svd-llm" in text
    assert "Warning: beware of [bold]brackets[/bold]" in text
    assert "By role" in text and "Speed" in text


def test_break_even_takes_any_shape(make_report):
    def text(entry):
        return rows.break_even(Report("m", "svd", accounting={"break_even": entry}))

    assert text(None) == "" and text(288) == "288" and text({"q": 288, "k": 144.5}) == "q: 288; k: 144.5"
    assert text({str(i): i for i in range(15)}).endswith("11: 11; and 3 more")
