from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest

from corank.errors import CorankError
from corank.report import Report, plots
from corank.report.canvas import DARK, LIGHT, line_look, log_ticks, times_label

pytest.importorskip("matplotlib")


def lines(axes, dots: bool = False):
    return [line for line in axes.get_lines() if (len(line.get_xdata()) == 1) == dots]


def title(figure) -> str:
    return figure.get_suptitle()


def test_spectra_draw_every_curve_and_every_rank(report):
    figure = plots.spectra(report)
    panels = [axes for axes in figure.axes if axes.get_title() in report.roles]
    assert [axes.get_title() for axes in panels] == report.roles
    for axes in panels:
        mine = [s for s in report.sites if s["role"] == axes.get_title()]
        drawn = lines(axes)
        assert len(drawn) == 30
        for site, line in zip(mine, drawn, strict=True):
            ranks, losses = zip(*site["curve"], strict=True)
            np.testing.assert_allclose(line.get_xdata(), np.array(ranks) / site["max_rank"])
            np.testing.assert_allclose(line.get_ydata(), losses)
        dots = {(d.get_xdata()[0], d.get_ydata()[0]) for d in lines(axes, dots=True)}
        assert dots == {(s["rank"] / s["max_rank"], s["loss"]) for s in mine if s["kind"] != "dense"}
    colours = [line.get_color() for line in lines(panels[0])]
    assert len(set(colours)) == 30
    assert title(figure).startswith("For a loss of 10%, down needs")


def test_spectra_show_the_largest_roles_when_there_are_many(report):
    sites = [dict(s, role=f"{s['role']}{i}") for i in range(2) for s in report.sites if s["layer"] < 2]
    figure = plots.spectra(dataclasses.replace(report, sites=sites))
    shown = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(shown) == 12 and not {"k0", "k1", "v0", "v1"} <= set(shown)
    assert title(figure).endswith("(the 12 largest of 14 roles)")


def test_the_rank_map_holds_the_share_kept(report):
    figure = plots.rank_map(report)
    axes = figure.axes[0]
    image = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    expected = np.full((7, 30), np.nan)
    for site in report.sites:
        expected[report.roles.index(site["role"]), site["layer"]] = site["params"] / site["params_dense"]
    np.testing.assert_allclose(image, expected)
    dots = {(int(d.get_xdata()[0]), int(d.get_ydata()[0])) for d in lines(axes, dots=True)}
    assert dots == {(s["layer"], report.roles.index(s["role"])) for s in report.sites if s["kind"] == "dense"}
    dense = sum(s["kind"] == "dense" for s in report.sites)
    assert len(axes.texts) == 210 - dense and title(figure).startswith(f"{dense} of 210 sites stay dense")


def test_the_rank_map_adds_up_experts_and_keeps_sites_outside_the_blocks(make_report):
    report = make_report(layers=1)
    base = dict(report.sites[0], params_dense=100, kind="low_rank")
    sites = [
        dict(base, role="expert", params=50),
        dict(base, role="expert", params=100, kind="dense"),
        dict(base, role="lm_head", layer=None, params=30),
    ]
    axes = plots.rank_map(dataclasses.replace(report, sites=sites)).axes[0]
    image = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    np.testing.assert_allclose(image, [[np.nan, 0.3], [0.75, np.nan]])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "–"]
    assert not lines(axes, dots=True)


def test_loss_by_layer_has_gaps_where_dense(report):
    figure = plots.loss_by_layer(report)
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.get_lines()] == report.roles
    for line in axes.get_lines():
        mine = {s["layer"]: s for s in report.sites if s["role"] == line.get_label()}
        expected = [math.nan if mine[i]["kind"] == "dense" else mine[i]["loss"] for i in range(30)]
        np.testing.assert_allclose(line.get_ydata(), expected)
    worst = max(report.sites, key=lambda s: s["loss"])
    assert title(figure).startswith(f"{worst['role']} of layer {worst['layer']} loses most")


def test_pareto_has_a_line_per_method(reports):
    figure = plots.pareto(reports)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("wikitext2", "earnings21")
    for axes in (first, second):
        assert axes.get_yscale() == "log"
        drawn = {line.get_label(): line for line in axes.get_lines()}
        assert list(drawn) == ["svd", "asvd", "svd-llm", "dense"]
        for method in ("svd", "asvd", "svd-llm"):
            mine = sorted((r.kept(), r.perplexity_ratio(axes.get_title())) for r in reports if r.method == method)
            np.testing.assert_allclose(drawn[method].get_xydata(), mine)
        assert drawn["dense"].get_xydata().tolist() == [[1.0, 1.0]]
    assert title(figure) == "svd-llm has the lowest perplexity on wikitext2 at every budget"


def test_pareto_marks_a_collapse_at_the_top(reports):
    lost = {"dense": {"wikitext2": 17.2}, "compressed": {"wikitext2": math.inf}}
    reports = [dataclasses.replace(reports[2], evaluation=lost), *reports[3:]]
    axes = plots.pareto(reports, texts=["wikitext2"]).axes[0]
    (cross,) = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert cross.get_xdata()[0] == reports[0].kept() and cross.get_ydata()[0] == axes.get_ylim()[1]
    assert "not finite" in axes.get_ylabel()


def test_pareto_names_the_winner_of_the_smallest_budget(make_report):
    reports = [make_report(keep=k, method=m, layers=2, wiki=10) for m in "ab" for k in (0.9, 0.6)]
    values = {("a", 0.9): 11.0, ("a", 0.6): 40.0, ("b", 0.9): 12.0, ("b", 0.6): 30.0}
    changed = []
    for report in reports:
        value = values[report.method, report.budget["keep"]]
        accounting = {"sites": {"dense": 100, "compressed": 100 * report.budget["keep"]}}
        evaluation = {"dense": {"w": 10.0}, "compressed": {"w": value}}
        changed.append(dataclasses.replace(report, accounting=accounting, evaluation=evaluation))
    assert title(plots.pareto(changed)) == "b has the lowest perplexity on w at 60% of the parameters"
    one = title(plots.pareto(changed[:2]))
    assert one == "Perplexity on w is 4.00× dense at 60% of the parameters"


@pytest.mark.parametrize(("layers", "keep", "dark"), [(1, 0.8, True), (2, 0.99, False), (20, 0.5, False)])
def test_all_plots_can_be_laid_out_at_any_size(make_report, layers, keep, dark, recwarn):
    drawn = plots.figures(make_report(layers=layers, keep=keep), dark=dark)
    assert list(drawn) == ["spectra", "rank_map", "loss_by_layer"]
    for figure in drawn.values():
        figure.draw_without_rendering()
        assert figure.get_facecolor()[:3] == pytest.approx((1, 1, 1) if not dark else (21 / 255, 25 / 255, 30 / 255))
    assert not [w for w in recwarn if "layout" in str(w.message)]


def test_what_the_numbers_do_not_allow_is_left_out(make_report):
    report = make_report(layers=2)
    bare = dataclasses.replace(report, sites=[{**s, "curve": None, "layer": None} for s in report.sites])
    assert list(plots.figures(bare)) == ["rank_map"]
    assert plots.figures(Report("m", "svd")) == {}
    for draw in (plots.spectra, plots.rank_map, plots.loss_by_layer):
        with pytest.raises(CorankError):
            draw(Report("m", "svd"))
    with pytest.raises(CorankError, match="evaluate both"):
        plots.pareto([Report("m", "svd")])


def test_files_and_svg(make_report, tmp_path):
    report = make_report(layers=3)
    path = plots.save(plots.loss_by_layer(report), tmp_path / "new" / "loss.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    text = plots.svg(plots.loss_by_layer(report))
    assert "<svg" in text and "<text" not in text
    assert text == plots.svg(plots.loss_by_layer(report))


def test_without_matplotlib_the_sentence_says_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (plots.spectra, plots.rank_map, plots.loss_by_layer, plots.figures):
        with pytest.raises(CorankError, match=r"pip install corank\[plot\]"):
            call(report)


def test_no_plot_needs_pyplot(make_report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it now fails
    assert "<svg" in plots.svg(plots.rank_map(make_report(layers=2)))


@pytest.mark.parametrize("high", [1.03, 1.4, 1.99, 2.0, 5.0, 40.0, 1e3, 1e6, 1e15])
def test_ticks_are_few_and_round(high):
    low = 1 / 1.02
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 9 and ticks == sorted(set(ticks)) and 1.0 in ticks
    assert all(low <= tick <= high for tick in ticks)
    labels = [times_label(t) for t in ticks]
    assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 9


def test_looks_and_themes():
    looks = [tuple(sorted((k, v) for k, v in line_look(i).items() if k != "linestyle")) for i in range(24)]
    assert len(set(looks)) == 24
    for theme in (LIGHT, DARK):
        # Contrast of WCAG 2, for greys: level AAA asks for 7.
        back, text = ((int(c[3:5], 16) / 255) ** 2.2 for c in (theme.back, theme.text))
        assert (max(back, text) + 0.05) / (min(back, text) + 0.05) > 7


def test_a_curve_that_ends_early_makes_no_claim_about_the_ranks_behind_its_end():
    from corank.report.headlines import spectra_headline
    from corank.report.plots import _fraction_for

    short = {"curve": [[0, 1.0], [4, 0.6]], "max_rank": 16}
    full = {"curve": [[0, 1.0], [8, 0.09], [16, 0.0]], "max_rank": 16}
    assert math.isnan(_fraction_for(short, 0.1)) and _fraction_for(full, 0.1) == 0.5
    assert "end at the ranks chosen" in spectra_headline({"q": math.nan}, 1)
    assert "50%" in spectra_headline({"q": math.nan, "k": 0.5}, 2)
