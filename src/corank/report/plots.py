"""Plots of a report. They need the JSON alone, not the model; matplotlib comes with ``pip install
corank[plot]``.

Colours are told apart by colour-blind readers (viridis for depth, Okabe-Ito for names, which differ in marker
too). A title says what there is to see, computed from the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from corank.errors import CorankError
from corank.report import numbers
from corank.report.canvas import (
    DARK,
    LIGHT,
    Theme,
    blank_figure,
    headline,
    line_look,
    log_ticks,
    percent_axis,
    save,
    side_legend,
    style_axes,
    svg,
    times_label,
)
from corank.report.headlines import (
    healing_headline,
    loss_headline,
    pareto_headline,
    rank_map_headline,
    spectra_headline,
)
from corank.report.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figures", "healing", "loss_by_layer", "pareto", "rank_map", "save", "spectra", "svg"]

_MOST_PANELS = 12


def spectra(report: Report, *, dark: bool = False) -> Figure:
    """Relative loss against rank fraction: a panel per role, a line per layer, a dot at the rank chosen.

    Raises:
        CorankError: no site has a curve, or matplotlib is missing.
    """
    theme = DARK if dark else LIGHT
    sites = [site for site in report.sites if site.get("curve") and site["max_rank"]]
    if not sites:
        raise CorankError("No site of this report has a curve; compress with a method that predicts its loss.")
    found = [role for role in report.roles if any(str(s["role"]) == role for s in sites)]
    weight = {role: sum(s["params_dense"] for s in sites if str(s["role"]) == role) for role in found}
    largest = sorted(found, key=lambda role: -weight[role])[:_MOST_PANELS]
    roles = [role for role in found if role in largest]
    columns = min(4, len(roles))
    rows = math.ceil(len(roles) / columns)
    figure = blank_figure(max(5.5, 2.6 * columns + 1.2), 2.5 * rows + 1.3, theme)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colour = _depth_colours(report, theme)
    needed: dict[str, float] = {}
    for axes, role in zip(grid.flat, roles, strict=False):
        mine = [site for site in sites if str(site["role"]) == role]
        for site in sorted(mine, key=lambda s: -1 if s["layer"] is None else s["layer"]):
            points = [(rank / site["max_rank"], loss) for rank, loss in site["curve"] if numbers.finite(loss)]
            if not points:
                continue
            tint = colour(site["layer"])
            axes.plot(*zip(*points, strict=True), color=tint, linewidth=1.1, alpha=0.85)
            if site["kind"] != "dense" and numbers.finite(site["loss"]):
                at = site["rank"] / site["max_rank"]
                axes.plot([at], [site["loss"]], "o", color=tint, markersize=3.6, markeredgewidth=0)
        needed[role] = _mean([_fraction_for(site, 0.1) for site in mine])
        axes.set_title(role, fontsize=11, color=theme.text, pad=4)
        style_axes(axes, theme)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
        labels = axes.get_xticklabels()
        for label, side in zip(labels[:1] + labels[-1:], ("left", "right"), strict=False):
            label.set_horizontalalignment(side)  # or else 1 meets the 0 of the next panel
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    spare = list(grid.flat)[len(roles) :]
    for axes in spare:
        axes.set_axis_off()
    for axes in list(grid.flat)[len(roles) - columns : len(roles)]:
        axes.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("rank / full rank (dot: the rank chosen)", fontsize=11, color=theme.text)
    figure.supylabel("relative loss", fontsize=11, color=theme.text)
    if len(report.layers) > 1:
        _depth_bar(figure, grid, spare[-1] if spare else None, report, theme)
    headline(figure, spectra_headline(needed, len(found)), theme)
    return figure


def rank_map(report: Report, *, dark: bool = False) -> Figure:
    """Share of the parameters kept, roles by layers, a dot where dense. Sites of one cell are added up.

    Raises:
        CorankError: the report has no sites, or matplotlib is missing.
    """
    theme = DARK if dark else LIGHT
    if not report.sites:
        raise CorankError("This report has no sites to draw; give the report of a compression.")
    roles, layers = report.roles, _columns(report)
    figure = blank_figure(min(13, max(5.5, 0.3 * len(layers) + 2.6)), 0.36 * len(roles) + 2.1, theme)
    axes = figure.subplots()
    cells: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for site in report.sites:
        cells.setdefault((str(site["role"]), site["layer"]), []).append(site)
    kept = [[_share(cells.get((role, layer), [])) for layer in layers] for role in roles]
    values = [[math.nan if cell is None else cell[0] for cell in row] for row in kept]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    write = len(layers) <= 40
    any_dense = False
    for y, row in enumerate(kept):
        for x, cell in enumerate(row):
            if cell is None:
                continue
            ink = "#ffffff" if cell[0] < 0.55 else "#101418"
            any_dense = any_dense or cell[1]
            if cell[1]:
                axes.plot([x], [y], "o", color=ink, markersize=3.2, markeredgewidth=0)
            elif write:
                axes.text(x, y, f"{100 * cell[0]:.0f}", color=ink, fontsize=7.5, ha="center", va="center")
    axes.set_facecolor(theme.faint)  # where there is no site
    axes.set_yticks(range(len(roles)), roles)
    step = max(1, math.ceil(len(layers) / 32))
    shown = sorted({*range(0, len(report.layers), step), *range(len(report.layers), len(layers))})
    axes.set_xticks(shown, ["–" if layers[i] is None else str(layers[i]) for i in shown])
    axes.set_xlabel("layer" + (" (dot: left dense)" if any_dense else ""), fontsize=11, color=theme.text)
    axes.tick_params(colors=theme.text, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, len(layers))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(roles))], minor=True)
    axes.grid(which="minor", color=theme.back, linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015, aspect=30, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0%", "50%", "100%"], fontsize=9, color=theme.text)
    bar.set_label("parameters kept", fontsize=10, color=theme.text)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    headline(figure, rank_map_headline(report), theme)
    return figure


def loss_by_layer(report: Report, *, dark: bool = False) -> Figure:
    """Relative loss against layer, a line per role; sites of one role and layer are averaged, dense ones left
    out.

    Raises:
        CorankError: no site inside a block has a loss, or matplotlib is missing.
    """
    theme = DARK if dark else LIGHT
    inside = [s for s in report.sites if s["layer"] is not None]
    sites = [s for s in inside if s["kind"] != "dense" and numbers.finite(s["loss"])]
    if not sites:
        raise CorankError("No factored site of this report has a layer and a loss; there is nothing to draw.")
    figure = blank_figure(9.5, 4.2, theme)
    axes = figure.subplots()
    for index, role in enumerate(r for r in report.roles if any(str(s["role"]) == r for s in sites)):
        mine = [s for s in sites if str(s["role"]) == role]
        losses = [_mean([s["loss"] for s in mine if s["layer"] == layer]) for layer in report.layers]
        axes.plot(report.layers, losses, label=role, linewidth=1.4, markersize=4.5, **line_look(index))
    style_axes(axes, theme)
    axes.set_ylim(bottom=0)
    axes.set_xlim(min(report.layers) - 0.5, max(report.layers) + 0.5)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.yaxis.set_major_formatter(percent_axis())
    axes.set_xlabel("layer", fontsize=11, color=theme.text)
    note = "" if len(sites) == len(inside) else " (gap: left dense)"
    axes.set_ylabel(f"relative loss{note}", fontsize=11, color=theme.text)
    side_legend(figure, axes, theme)
    headline(figure, loss_headline(sites), theme)
    return figure


def pareto(reports: Sequence[Report], *, texts: Sequence[str] | None = None, dark: bool = False) -> Figure:
    """Perplexity over that of the dense model (log) against parameters kept over the sites, a line per
    method.

    Args:
        reports: of one model, several methods and budgets.
        texts: the texts to draw, a panel each (None: all that every report has, at most three).

    Raises:
        CorankError: there is no text with a dense and a compressed perplexity, or matplotlib is missing.
    """
    texts = list(texts) if texts is not None else _common_texts(reports)[:3]
    if not texts:
        raise CorankError("These reports share no text with a dense and a compressed perplexity; evaluate both.")
    return pareto_points({text: _points(reports, text) for text in texts}, dark=dark)


def pareto_points(points: Mapping[str, Sequence[tuple[str, float, float]]], *, dark: bool = False) -> Figure:
    """The plot of `pareto`, from (method, share of the parameters kept, perplexity over dense) by text.

    Raises:
        CorankError: there is no point, or matplotlib is missing.
    """
    theme, texts = DARK if dark else LIGHT, list(points)
    figure = blank_figure(max(6.5, 4.1 * len(texts) + 1.9), 4.5, theme)
    row = figure.subplots(1, len(texts), sharey=True, sharex=True, squeeze=False)[0]
    methods = list(dict.fromkeys(method for text in texts for method, _, _ in points[text]))
    drawn = [y for text in texts for _, _, y in points[text] if math.isfinite(y) and y > 0]
    if not any(points.values()):
        raise CorankError(f"No report has both perplexities on {', '.join(texts)}; evaluate both models.")
    bottom, top = min([1.0, *drawn]), max([1.05, *drawn])
    margin = (top / bottom) ** 0.06
    bottom, top = bottom / margin, top * margin
    collapsed = False
    for axes, text in zip(row, texts, strict=True):
        for index, method in enumerate(methods):
            mine = sorted((x, y) for m, x, y in points[text] if m == method)
            finite = [(x, y) for x, y in mine if math.isfinite(y) and y > 0]
            if mine:
                xs, ys = zip(*finite, strict=True) if finite else ((), ())
                axes.plot(xs, ys, label=method, linewidth=1.5, markersize=6, **line_look(index))
            lost = [x for x, y in mine if not (math.isfinite(y) and y > 0)]
            if lost:
                collapsed, colour = True, line_look(index)["color"]
                axes.plot(lost, [top] * len(lost), "x", color=colour, markersize=8, markeredgewidth=2, clip_on=False)
        axes.plot([1], [1], "*", color=theme.text, markersize=13, label="dense", clip_on=False, zorder=5)
        axes.set_yscale("log")
        style_axes(axes, theme)
        if len(texts) > 1:
            axes.set_title(text, fontsize=11, color=theme.text, pad=4)
        low = min([0.9, *(x for t in texts for _, x, _ in points[t])])
        axes.set_xlim(low - 0.04 * (1 - low), 1 + 0.05 * (1 - low))
        axes.set_ylim(bottom, top)
        axes.xaxis.set_major_formatter(percent_axis())
        axes.locator_params(axis="x", nbins=6)
    ticks = log_ticks(bottom, top)
    row[0].set_yticks(ticks, [times_label(tick) for tick in ticks])
    row[0].set_yticks([], minor=True)
    label = "perplexity / dense" + (" (x: not finite)" if collapsed else "")
    row[0].set_ylabel(label, fontsize=11, color=theme.text)
    figure.supxlabel("parameters kept over the sites", fontsize=11, color=theme.text)
    side_legend(figure, row[-1], theme)
    headline(figure, pareto_headline(points[texts[0]], texts[0]), theme)
    return figure


def healing(report: Report, *, dark: bool = False) -> Figure:
    """Loss on held-out sequences against minutes of healing: a panel for every time the model was healed.

    Raises:
        CorankError: the model was not healed, or matplotlib is missing.
    """
    theme = DARK if dark else LIGHT
    told = [step for step in report.extra.get("healing") or [] if isinstance(step, Mapping) and step.get("curve")]
    if not told:
        raise CorankError("This report tells of no healing; `corank heal` writes what there is to draw.")
    figure = blank_figure(max(5.5, 3.6 * len(told) + 1.2), 3.6, theme)
    row = figure.subplots(1, len(told), squeeze=False)[0]
    for index, (axes, step) in enumerate(zip(row, told, strict=True)):
        points = [(seconds / 60, loss) for seconds, loss in step["curve"] if numbers.finite(loss)]
        axes.plot(*zip(*points, strict=True), linewidth=1.6, markersize=4.5, **line_look(index))
        axes.axhline(step["after"], color=theme.text, linewidth=0.8, linestyle=":")
        style_axes(axes, theme)
        axes.set_title(str(step.get("how")), fontsize=11, color=theme.text, pad=4)
        axes.set_xlim(left=0)
        axes.set_xlabel("minutes (dotted: what is kept)", fontsize=11, color=theme.text)
        axes.set_ylabel(str(step.get("measure", "loss")), fontsize=10, color=theme.text)
    headline(figure, healing_headline(told), theme)
    return figure


def figures(report: Report, *, dark: bool = False) -> dict[str, Figure]:
    """All plots of one report that its numbers allow: name -> figure."""
    drawn: dict[str, Figure] = {}
    drawings = (("spectra", spectra), ("rank_map", rank_map), ("loss_by_layer", loss_by_layer), ("healing", healing))
    for name, draw in drawings:
        blank_figure(1, 1, LIGHT)  # a missing matplotlib is an error, a missing curve is not
        try:
            drawn[name] = draw(report, dark=dark)
        except CorankError:
            continue
    return drawn


def _depth_colours(report: Report, theme: Theme) -> Any:
    import matplotlib

    viridis = matplotlib.colormaps["viridis"]
    layers = report.layers
    first, last = (layers[0], layers[-1]) if layers else (0, 0)

    def colour(layer: int | None) -> Any:
        if layer is None or last == first:
            return theme.text
        return viridis(theme.low + (theme.high - theme.low) * (layer - first) / (last - first))

    return colour


def _depth_bar(figure: Figure, grid: Any, spare: Axes | None, report: Report, theme: Theme) -> None:
    """The scale of the layers, in the spare panel if there is one, else at the right."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    first, last = report.layers[0], report.layers[-1]
    colour = _depth_colours(report, theme)
    shades = ListedColormap([colour(first + (last - first) * i / 255) for i in range(256)])
    scale = ScalarMappable(Normalize(first, last), shades)
    if spare is not None:
        inside = spare.inset_axes((0.15, 0.5, 0.7, 0.07))
        bar = figure.colorbar(scale, cax=inside, orientation="horizontal", ticks=[first, last])
        inside.set_title("layer", fontsize=11, color=theme.text, pad=6)
    else:
        bar = figure.colorbar(scale, ax=grid, fraction=0.025, pad=0.015, ticks=[first, last])
        bar.set_label("layer", fontsize=11, color=theme.text, labelpad=-6)
    bar.ax.tick_params(colors=theme.text, labelsize=9, length=0)
    bar.outline.set_visible(False)


def _columns(report: Report) -> list[int | None]:
    outside: list[int | None] = [None] if any(site["layer"] is None for site in report.sites) else []
    return [*report.layers, *outside]


def _share(sites: Sequence[dict[str, Any]]) -> tuple[float, bool] | None:
    """(share of the parameters kept, all dense) of some sites; None if there are none."""
    before = sum(s["params_dense"] for s in sites)
    if not before:
        return None
    return sum(s["params"] for s in sites) / before, all(s["kind"] == "dense" for s in sites)


def _fraction_for(site: dict[str, Any], loss: float) -> float:
    """The smallest fraction of the full rank on the curve at which the relative loss is at most ``loss``.

    NaN if the curve ends, short of the full rank, before it has fallen that far: a selection stops at its rank.
    """
    if site["curve"] and site["curve"][-1][0] < site["max_rank"] and site["curve"][-1][1] > loss:
        return math.nan
    ranks = [rank for rank, value in site["curve"] if numbers.finite(value) and value <= loss]
    return min(ranks) / site["max_rank"] if ranks else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _common_texts(reports: Sequence[Report]) -> list[str]:
    """Texts with both perplexities in every report; if there is none, in any."""
    each = [
        [t for t in r.texts() if r.perplexity(t, "dense") is not None and r.perplexity(t) is not None] for r in reports
    ]
    found = list(dict.fromkeys(text for texts in each for text in texts))
    return [text for text in found if all(text in texts for texts in each)] or found


def _points(reports: Sequence[Report], text: str) -> list[tuple[str, float, float]]:
    """(method, kept, perplexity ratio) of the reports with both perplexities on this text."""
    known = [r for r in reports if r.perplexity(text) is not None and r.perplexity(text, "dense") is not None]
    return [(r.method, r.kept(), r.perplexity_ratio(text)) for r in known if math.isfinite(r.kept())]
